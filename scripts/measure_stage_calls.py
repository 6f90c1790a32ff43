"""What one call of a stage costs, by Ray and by the socket of actors.stage_link: CPU of both ends, and latency.

    .venv/bin/python scripts/measure_stage_calls.py [CALLS]

An actor that computes nothing is called as a replica calls its encoder and its engine, 50 times a second: two callers'
PCM, two callers' codes. CPU is each process's own, less what it uses between calls. Run it on an idle machine; the
table is in docs/decisions/stage-link.md.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
import ray

from actors.stage_link import StageLink, StageServer
from graphs.stages import FrameKey, StageBatch, StageReply, Verdict

EVERY_S, WARM_UP = 0.02, 50
Call = Callable[[StageBatch], Awaitable[StageReply]]
Cpu = Callable[[], Awaitable[float]]


class Shell:
    """Answers at once. `describe` stands for "how much CPU have you used": it is a method that the link knows."""

    def describe(self) -> float:
        return time.process_time()

    def step(self, batch: StageBatch) -> StageReply:
        n = len(batch.keys)
        return StageReply(batch.keys, (Verdict.DONE,) * n, (0,) * n, np.zeros((n, 8), np.int16))

    def listen(self) -> str:
        self._server = StageServer(self)
        return self._server.address

    def serve(self) -> None:
        self._server.serve()


async def measure(how: str, call: Call, cpu: Cpu, width: int, calls: int) -> None:
    """One line of the table."""
    keys = tuple(FrameKey(f"{caller:032d}", 1, 5) for caller in range(2))
    batch = StageBatch(keys, np.random.default_rng(1).integers(-9999, 9999, (2, width)).astype(np.int16))
    for _ in range(WARM_UP):
        await call(batch)

    async def spent(calls_each: int) -> tuple[float, float, list[float]]:
        took_s, ours, theirs = [], time.process_time(), await cpu()
        for _ in range(calls):
            began_s = time.perf_counter()
            for _ in range(calls_each):
                await call(batch)
            took_s.append(time.perf_counter() - began_s)
            await asyncio.sleep(EVERY_S)
        return time.process_time() - ours, await cpu() - theirs, sorted(took_s)

    idle = await spent(0)
    busy = await spent(1)
    caller_ms, stage_ms = ((busy[i] - idle[i]) / calls * 1e3 for i in (0, 1))
    p50_ms, p99_ms = (busy[2][int(calls * part)] * 1e3 for part in (0.5, 0.99))
    print(f"{how:8} {2 * width:6} {caller_ms:10.2f} {stage_ms:9.2f} {p50_ms:8.2f} {p99_ms:8.2f}", flush=True)


async def main(calls: int) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    print("by        bytes  caller ms  stage ms   p50 ms   p99 ms")
    for width in (1920, 8):
        stage = ray.remote(Shell).remote()
        try:
            await measure("Ray", stage.step.remote, stage.describe.remote, width, calls)
            link = await StageLink.to(await stage.listen.remote())
            serving = stage.serve.remote()
            step, describe = partial(link.call, "step"), partial(link.call, "describe")
            await measure("socket", step, describe, width, calls)
            link.close()
            await serving
        finally:
            ray.kill(stage)
    ray.shutdown()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))

"""What one frame costs between ingress and replica, by trunk, by actor call, by Serve handle: p50 and p99 in ms.

    .venv/bin/python scripts/measure_hops.py [SECONDS]

Two processes in every case. Each of N sessions sends 80 ms of PCM (3,840 bytes) every 80 ms, spread over the 80 ms
as callers are, and is answered at once with as much. Run it on an idle machine; the table is in
docs/decisions/trunk-websocket.md.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from collections.abc import Awaitable, Callable

import numpy as np
import ray
from ray import serve

from actors.messages import Down, DownSink, FrameIn, FrameOut, OpenRequest, Ready
from graphs.stages import FrameKey, SessionSpec
from serving.settings import ServeSettings
from serving.trunk_client import Trunk
from serving.trunk_server import TrunkConfig, TrunkServer

FRAME_S = 0.08
PCM = np.zeros(1920, dtype=np.int16)
SETTINGS = ServeSettings()
CONFIG = TrunkConfig("only for this measurement", SETTINGS.trunk_ping_s, SETTINGS.trunk_dead_s)
Exchange = Callable[[int, int], Awaitable[None]]


class Echo:
    """A replica that answers every frame at once."""

    def __init__(self) -> None:
        self.sinks: dict[tuple[str, int], DownSink] = {}

    async def open(self, request: OpenRequest, sink: DownSink) -> None:
        self.sinks[request.session, request.epoch] = sink
        sink(Ready(request.session, request.epoch, 0, 0, "", 0.0))

    def offer(self, frame: FrameIn) -> None:
        codes, row = np.zeros(8, dtype=np.int16), np.zeros(17, dtype=np.int16)
        out = FrameOut(frame.key, frame.pcm, 3, "", codes, codes, row, 1.0)
        self.sinks[frame.key.session, frame.key.epoch](out)

    async def close(self, session: str, epoch: int, reason: str) -> None:
        self.sinks.pop((session, epoch), None)


class EchoActor:
    async def start(self) -> str:
        self.server = TrunkServer(Echo(), "r", CONFIG)
        return await self.server.start("127.0.0.1")

    async def echo(self, data: bytes) -> bytes:
        return data

    async def cpu_s(self) -> float:
        return _cpu_s()


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
class EchoDeployment:
    async def echo(self, data: bytes) -> bytes:
        return data

    async def cpu_s(self) -> float:
        return _cpu_s()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def measure(sessions: int, seconds: float, exchange: Exchange) -> list[float]:
    """Round trips in ms of all sessions."""
    trips: list[float] = []

    async def talk(session: int) -> None:
        start_s = time.perf_counter() + FRAME_S * session / sessions
        for frame in range(int(seconds / FRAME_S)):
            await asyncio.sleep(start_s + frame * FRAME_S - time.perf_counter())
            sent_s = time.perf_counter()
            await exchange(session, frame)
            trips.append((time.perf_counter() - sent_s) * 1000)

    await asyncio.gather(*(talk(session) for session in range(sessions)))
    return trips


async def over_trunk(address: str, sessions: int, seconds: float) -> list[float]:
    trunk = await Trunk.connect(address, "i", CONFIG)
    waiting: dict[tuple[int, int], asyncio.Future[None]] = {}
    opened = asyncio.Semaphore(0)

    def sink(message: Down) -> None:
        if isinstance(message, FrameOut):
            waiting.pop((int(message.key.session), message.key.frame)).set_result(None)
        else:
            opened.release()

    for session in range(sessions):
        trunk.attach(str(session), sessions, sink)
        await trunk.send(OpenRequest(str(session), sessions, "t", "i", SessionSpec("v", "", 0)))
        await opened.acquire()

    async def exchange(session: int, frame: int) -> None:
        answered = waiting[session, frame] = asyncio.get_running_loop().create_future()
        await trunk.send(FrameIn(FrameKey(str(session), sessions, frame), PCM))
        await answered

    try:
        return await measure(sessions, seconds, exchange)
    finally:
        await trunk.close()


async def main(seconds: float) -> None:
    data = PCM.tobytes()
    actor = ray.remote(EchoActor).options(num_cpus=0.1).remote()
    address = await actor.start.remote()
    handle = serve.run(EchoDeployment.bind(), name="echo", route_prefix=None)

    async def by_actor(session: int, frame: int) -> None:
        await actor.echo.remote(data)

    async def by_handle(session: int, frame: int) -> None:
        await handle.echo.remote(data)

    print(f"{'hop':<22}{'sessions':>9}{'p50 ms':>8}{'p99 ms':>8}{'CPU ms a frame, both ends':>28}")
    for sessions in (1, 8, 32):
        hops: dict[str, tuple[Callable[[], Awaitable[list[float]]], Callable[[], Awaitable[float]]]] = {
            "trunk": (lambda n=sessions: over_trunk(address, n, seconds), lambda: actor.cpu_s.remote()),
            "async actor call": (lambda n=sessions: measure(n, seconds, by_actor), lambda: actor.cpu_s.remote()),
            "Serve handle call": (lambda n=sessions: measure(n, seconds, by_handle), lambda: handle.cpu_s.remote()),
        }
        for name, (run, far_cpu_s) in hops.items():
            before_s = _cpu_s() + await far_cpu_s()
            trips = np.array(await run())
            cost_ms = (_cpu_s() + await far_cpu_s() - before_s) * 1000 / len(trips)
            p50, p99 = np.percentile(trips, [50, 99])
            print(f"{name:<22}{sessions:>9}{p50:>8.2f}{p99:>8.2f}{cost_ms:>28.2f}", flush=True)


if __name__ == "__main__":
    os.environ |= {"RAY_worker_niceness": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0))
    serve.delete("echo")
    ray.shutdown()

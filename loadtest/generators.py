"""The calls of a plan spread over processes of their own: one Python process drives some hundred calls on time.

Even a single generator gets a process for itself, so that nothing its parent does can make it late. They talk in
pickles over the child's stdin and stdout:

    plan, which share → ;  ← ready;  when to begin → ;  ← running totals, four times a second;  ← records
"""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import IO, Any

from loadtest.load import CallRecord, LoadPlan, Speeches, counts, hold_calls

CALLS_PER_PROCESS = 100  # 128 were driven with a lag of 5 ms at p99, on cores that had other work
_LOOK_S = 0.25


class GeneratorDied(RuntimeError):
    """A generator's process ended without a result; nothing can be said about the run."""


def processes_for(sessions: int) -> int:
    """How many generators drive so many calls in time."""
    return -(-sessions // CALLS_PER_PROCESS)


def run_load(
    plan: LoadPlan, processes: int | None = None, on_progress: Callable[[list[int]], None] = lambda totals: None
) -> list[CallRecord]:
    """Holds all calls of the plan and returns their records in order.

    `on_progress` is given the running totals (see Count) four times a second. Raises GeneratorDied.
    """
    number = min(plan.sessions, processes or processes_for(plan.sessions))
    with ThreadPoolExecutor(number) as threads:
        generators = [_Generator(plan, index, number) for index in range(number)]
        try:
            for generator in generators:
                generator.answer()  # ready: everything is imported and what is said first is encoded
            # CLOCK_MONOTONIC is one for all processes of a machine.
            start_s = time.monotonic() + _LOOK_S
            running = [threads.submit(generator.run, start_s) for generator in generators]
            left: set[Future[list[CallRecord]]] = set(running)
            while left:
                done, left = wait(left, _LOOK_S, FIRST_EXCEPTION)
                on_progress([sum(column) for column in zip(*(each.totals for each in generators), strict=True)])
                for future in done:
                    future.result()
            return sorted((record for future in running for record in future.result()), key=lambda each: each.call)
        finally:
            for generator in generators:
                generator.stop()


class _Generator:
    """The parent's end of one process."""

    def __init__(self, plan: LoadPlan, index: int, of: int) -> None:
        self.totals = counts()
        # A session of its own: Ctrl-C is for us, who end it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.generators"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._say((plan, index, of))

    def run(self, start_s: float) -> list[CallRecord]:
        self._say(start_s)
        while True:
            answer = self.answer()
            if isinstance(answer, tuple):
                return list(answer)
            self.totals = answer

    def answer(self) -> Any:
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            raise GeneratorDied(f"a generator ended with exit code {code}; its last words are above") from None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what it was never told does not matter any more

    def _say(self, what: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise GeneratorDied("a generator ended before it was told what to do") from None


def generate(orders: IO[bytes], answers: IO[bytes]) -> None:
    """A generator's life: every `of`-th call of the plan, so that the ramp is spread over all generators."""

    def say(what: object) -> None:
        pickle.dump(what, answers)
        answers.flush()

    plan, index, of = pickle.load(orders)
    speeches = Speeches(plan)
    # What is there now stays to the end; a collection that walks over it would make frames late.
    gc.collect()
    gc.freeze()
    say("ready")
    start_s = pickle.load(orders)
    totals = counts()

    async def report() -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            say(list(totals))

    async def hold() -> list[CallRecord]:
        reporting = asyncio.create_task(report())
        try:
            calls = range(index, plan.sessions, of)
            return await hold_calls(plan, calls, speeches, start_s=start_s, totals=totals)
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    say(tuple(asyncio.run(hold())))


def _main() -> None:
    """Our stdout is for answers; whatever else prints goes to stderr."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        generate(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()

"""Time that stands still until a test moves it, and the turns of the event loop that take none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class FakeClock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.time = 0.0
        self._timers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self.time

    async def wait_for(self, what: Awaitable[T], timeout_s: float) -> T:
        task = asyncio.ensure_future(what)
        timer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self.time + timeout_s, timer)
        self._timers.append(entry)
        try:
            await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise TimeoutError
        finally:
            self._timers.remove(entry)
            timer.cancel()
            task.cancel()

    async def advance(self, seconds: float) -> None:
        self.time += seconds
        for due, timer in list(self._timers):
            if due <= self.time and not timer.done():
                timer.set_result(None)
        await settle()


async def settle(turns: int = 200) -> None:
    """Lets everything run that can run without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)

"""A clock that moves only when nothing else does: what takes seconds is tested at once, on however slow a machine.

Sockets of this process and threads are real, and are waited for; for sleeps nobody waits.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import wraps
from typing import Any, ParamSpec
from unittest import mock

import pytest

from tests import leaks

P = ParamSpec("P")

# The kernel hands bytes from one socket of ours to the other at once, but for when it has much to do.
UNDER_WAY_S = 0.002


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Jumps to the next timer as soon as no callback, socket or thread has anything to do."""

    def __init__(self) -> None:
        self._now_s = time.monotonic()
        self._at_work = 0  # threads
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self._now_s

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self._at_work += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: object) -> None:
        self._at_work -= 1

    def wait(self, select: Callable[[float | None], list[Any]], timeout_s: float | None) -> list[Any]:
        """The selector's events within `timeout_s` of this clock."""
        if timeout_s is None or timeout_s <= 0 or self._at_work:
            return select(timeout_s if not self._at_work else UNDER_WAY_S)
        events = select(UNDER_WAY_S)
        if not events:
            self._now_s += timeout_s
        return events


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        return self._loop.wait(super().select, timeout)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test on such a loop. `time.monotonic()` is its clock, too; whoever has taken hold of that function before,
    as a default argument does, is to be given `asyncio.get_running_loop().time`."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with (
            asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
            mock.patch.object(time, "monotonic", runner.get_loop().time),
        ):
            runner.run(_alone(test(*args, **kwargs)))

    return run


async def _alone(test: Coroutine[Any, Any, None]) -> None:
    """A test, and the check that it leaves no task."""
    await test
    left = await leaks.tasks(set())
    if left:
        pytest.fail(f"it left tasks running:\n{left}", pytrace=False)

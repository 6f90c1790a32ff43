"""Waiting for what happens in another process, where there is no event to wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

EVERY_S = 0.05


async def until(look: Callable[[], Awaitable[T]], within_s: float) -> T:
    """The first answer of `look` that is true. Raises TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not (seen := await look()):  # noqa: ASYNC110 - see above
            await asyncio.sleep(EVERY_S)
        return seen

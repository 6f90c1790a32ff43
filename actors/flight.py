"""A frame on its way through the stages, and the queue before each of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from graphs.stages import FrameKey, StageBatch

if TYPE_CHECKING:
    from actors.call import Call

Rows = npt.NDArray[np.int16]


class Flight:
    """One frame between its arrival and its answer. `row` is what the next stage reads."""

    __slots__ = (
        "agent_codes",
        "arrived_s",
        "call",
        "first_row",
        "journal_row",
        "key",
        "next_column",
        "row",
        "text_token",
        "user_codes",
    )

    def __init__(self, call: Call, key: FrameKey, pcm: Rows, arrived_s: float) -> None:
        self.call = call
        self.key = key
        self.arrived_s = arrived_s
        self.row = pcm  # [1920] PCM, then [8] user codes, then [8] agent codes
        self.user_codes: Rows = _EMPTY
        self.agent_codes: Rows = _EMPTY
        self.journal_row: Rows = _EMPTY
        self.next_column: Rows = _EMPTY
        self.first_row = 0
        self.text_token = 0


_EMPTY: Rows = np.zeros(0, dtype=np.int16)


def batch_of(flights: Sequence[Flight], width: int) -> StageBatch:
    """Stacks what is to be sent; no flights give the empty batch that only prefills."""
    data = np.empty((len(flights), width), dtype=np.int16)
    for i, flight in enumerate(flights):
        data[i] = flight.row
    return StageBatch(tuple(flight.key for flight in flights), data)


class FrameQueue:
    """Frames waiting for one stage: in order within a conversation, one of each conversation at a time.

    It needs no bound of its own: a call has only so many frames in flight (Call.accept).
    """

    def __init__(self) -> None:
        self._waiting: dict[Call, deque[Flight]] = {}
        self._bell = asyncio.Event()

    def put(self, flight: Flight) -> None:
        self._waiting.setdefault(flight.call, deque()).append(flight)
        self._bell.set()

    def put_back(self, flights: Sequence[Flight]) -> None:
        """Puts a conversation's frames before those of it that wait already."""
        for flight in reversed(flights):
            self._waiting.setdefault(flight.call, deque()).appendleft(flight)
        self._bell.set()

    def drop(self, call: Call) -> None:
        self._waiting.pop(call, None)

    def clear(self) -> None:
        self._waiting.clear()

    def ring(self) -> None:
        """Wakes the loop although no frame came."""
        self._bell.set()

    def has(self, call: Call) -> bool:
        return call in self._waiting

    def __len__(self) -> int:
        return sum(len(flights) for flights in self._waiting.values())

    async def rung(self) -> None:
        """Returns once something has changed since the last time."""
        await self._bell.wait()
        self._bell.clear()

    async def wait(self, or_when: Callable[[], bool] | None = None) -> None:
        """Returns when a frame waits, or `or_when` holds."""
        while not self._waiting:
            if or_when is not None and or_when():
                await asyncio.sleep(0)  # a stage that answers at once must not starve the other loops
                return
            await self.rung()

    def take(self) -> list[Flight]:
        """The oldest frame of every conversation that has one."""
        flights = [waiting.popleft() for waiting in self._waiting.values()]
        self._waiting = {call: waiting for call, waiting in self._waiting.items() if waiting}
        return flights

"""Stages without a model: lanes and an engine of arithmetic for real gates, and actors in miniature around them."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.stages import Past, PromptInfo, SessionSpec, StageBatch

Rows = npt.NDArray[np.int16]
CARD = 2048  # values that a code can have
NO_FRAMES = StageBatch((), np.zeros((0, 8), dtype=np.int16))


class FakeLane(ABC):
    """What a rebuild asks of a lane beside its work. These remember everything, so they are rebuilt from the start."""

    group, run_most = 4, 1

    @abstractmethod
    def run(self, slots: Sequence[int], data: Rows) -> Rows: ...

    def replay(self, slots: Sequence[int], data: Rows, *, outputs: bool) -> None:
        del outputs
        self.run(slots, data[:, 0])

    def snapshot(self, slot: int) -> Any:
        raise AssertionError("a stream that remembers everything cannot go on from the middle")

    restore = snapshot


class FakeEncoderLane(FakeLane):
    """Codes that depend on all PCM a slot has heard since its reset."""

    def __init__(self, slots: int) -> None:
        self.state = [0] * slots

    def run(self, slots: Sequence[int], data: Rows) -> Rows:
        out = np.zeros((len(slots), 8), dtype=np.int16)
        for i, slot in enumerate(slots):
            self.state[slot] = (self.state[slot] * 31 + int(data[i, 0]) + 7) % CARD
            out[i] = (self.state[slot] + np.arange(8)) % CARD
        return out

    def reset(self, slot: int) -> None:
        self.state[slot] = 0


class FakeDecoderLane(FakeLane):
    def __init__(self, slots: int) -> None:
        self.state = [0] * slots

    def run(self, slots: Sequence[int], data: Rows) -> Rows:
        out = np.zeros((len(slots), 1920), dtype=np.int16)
        for i, slot in enumerate(slots):
            self.state[slot] = (self.state[slot] * 17 + int(data[i].sum()) + 3) % 30_000
            out[i] = self.state[slot]
        return out

    def reset(self, slot: int) -> None:
        self.state[slot] = 0


class FakeStep(NamedTuple):
    tokens: Rows
    journal: Rows
    ready: tuple[int, ...]
    pending: int
    next_columns: Rows
    first_rows: npt.NDArray[np.int32]


class FakeEngine:
    """Tokens that depend on the seed and on all codes a slot was given; a prompt takes `prompt_steps` steps.

    A role of "bad" is refused, as a role that is too long would be.
    """

    def __init__(self, slots: int, prompt_steps: int = 3) -> None:
        self.prompt_steps = prompt_steps
        self.state = [0] * slots
        self.left: dict[int, int] = {}
        self.open_slots: set[int] = set()
        self.steps = 0

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> PromptInfo:
        if spec.role == "bad":
            raise ValueError("This role cannot be taken: shorten it.")
        assert slot not in self.open_slots
        self.open_slots.add(slot)
        self.left[slot] = self.prompt_steps
        self.state[slot] = spec.seed % 9973
        if past is not None:
            assert past.first_row == 0
            assert past.rows[0, 0] == self.state[slot], "the journal of another conversation"
            for row in past.rows:
                assert row[0] == self.state[slot]
                self._hear(slot, row[9:])
        return PromptInfo(10 * self.prompt_steps, f"hash-of-{spec.voice}")

    def step(self, slots: Sequence[int], codes: Rows) -> FakeStep:
        self.steps += 1
        tokens = np.zeros((len(slots), 9), dtype=np.int16)
        journal = np.zeros((len(slots), 17), dtype=np.int16)
        for i, slot in enumerate(slots):
            assert slot in self.open_slots
            assert slot not in self.left, "stepped before it was ready"
            journal[i, 0] = self.state[slot]
            journal[i, 9:] = codes[i]
            self._hear(slot, codes[i])
            tokens[i, 0] = self.state[slot] % 100
            tokens[i, 1:] = (self.state[slot] + np.arange(8)) % CARD
        ready = []
        for slot in list(self.left):
            self.left[slot] -= 1
            if self.left[slot] == 0:
                del self.left[slot]
                ready.append(slot)
        begun = np.where(journal > 0, journal - 1, np.int16(-2))
        return FakeStep(tokens, journal, tuple(ready), len(self.left), begun, np.zeros(len(slots), dtype=np.int32))

    def _hear(self, slot: int, codes: Rows) -> None:
        self.state[slot] = (self.state[slot] * 13 + int(codes.sum()) + 1) % 9973

    def close(self, slot: int) -> None:
        self.open_slots.discard(slot)
        self.left.pop(slot, None)


@dataclass
class Pause:
    """A point at which a stage's call stands still until it is let go."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)


class Handle:
    """An actor in miniature: one call after the other, in order; can be paused before or after its work, made to
    fail, or to take a random number of turns."""

    def __init__(self, stage: Any, turns: Callable[[], int] = lambda: 1) -> None:
        self.stage = stage
        self.calls: list[str] = []
        self.batches: list[StageBatch] = []
        self.errors: dict[str, Exception] = {}
        self.behind: bool | None = None  # how its last rebuild was to go
        self.hurried = 0
        self._pauses: dict[tuple[str, str], Pause] = {}
        self._turns = turns
        self._lock = asyncio.Lock()

    def pause(self, method: str, when: str = "before") -> Pause:
        pause = self._pauses[method, when] = Pause()
        return pause

    async def _reach(self, method: str, when: str) -> None:
        pause = self._pauses.pop((method, when), None)
        if pause is not None:
            pause.reached.set()
            await pause.go.wait()

    async def _do(self, method: str, *args: Any) -> Any:
        async with self._lock:
            for _ in range(self._turns()):
                await asyncio.sleep(0)
            await self._reach(method, "before")
            self.calls.append(method)
            if method in self.errors:
                raise self.errors[method]
            result = getattr(self.stage, method)(*args)
        await self._reach(method, "after")
        return result

    async def open(self, *args: Any) -> Any:
        return await self._do("open", *args)

    async def close(self, session: str, epoch: int) -> None:
        await self._do("close", session, epoch)

    async def rebuild(self, budget_s: float, *, behind: bool) -> Any:
        self.behind = behind
        return await self._do("rebuild", budget_s)

    def hurry(self) -> None:
        self.hurried += 1

    async def step(self, batch: StageBatch) -> Any:
        self.batches.append(batch)
        return await self._do("step", batch)

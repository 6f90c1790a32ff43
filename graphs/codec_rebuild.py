"""Streams of the codec put back where they stood: what a conversation's journal kept, run again beside live frames.

A stream's state is a function of the last frames it was given, as far as its convolutions and windows reach. Those are
run again through the lane itself, in the order of operations that live frames are computed in, so that the state has
the very bits it had: several frames of a slot a call where the lane can (`replay`), and without what only matters to
those who listen, but for the last frames.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from graphs.stages import CodecPast

Int16 = npt.NDArray[np.int16]

# Frames at the end that are run in full: the histories of the convolutions behind the decoder's transformer, which
# reach less than five back, come from them.
HEARD_FRAMES = 8


class Stream(Protocol):
    """A graphs.codec lane."""

    @property
    def group(self) -> int:
        """Neighbouring slots that are computed together."""
        ...

    @property
    def run_most(self) -> int:
        """Frames of one slot that `replay` takes at once to its advantage."""
        ...

    def replay(self, slots: Sequence[int], data: Int16, *, outputs: bool) -> None: ...

    def snapshot(self, slot: int) -> dict[str, Tensor]: ...

    def restore(self, slot: int, snapshot: Mapping[str, Tensor]) -> None: ...


class LaneRebuild:
    """All rebuilds of one lane, advanced together. Not thread-safe: for the lane's own caller."""

    def __init__(
        self, lane: Stream, receptive: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """receptive: `MimiConfig.receptive_frames` of the lane's codec; None: take all that there is."""
        self._lane, self._receptive, self._clock = lane, receptive, clock
        self._left: dict[int, deque[Int16]] = {}  # slot → rows, in order of arrival
        self._group_s: float | None = None  # what one frame of one group takes

    def __len__(self) -> int:
        return len(self._left)

    def begin(self, slot: int, past: CodecPast) -> bool:
        """Takes on a slot, which has to be a fresh stream. False if less is known than the stream depends on."""
        rows = past.rows if self._receptive is None else past.rows[-self._receptive :]
        first = past.next_frame - len(rows)
        if first > 0:
            # Positions turn the keys and choose their places in the ring, so the count of frames must be the true one.
            fresh = self._lane.snapshot(slot)
            fresh["frames"].fill_(first)
            self._lane.restore(slot, fresh)
        if len(rows):
            self._left[slot] = deque(rows)
        return first == 0 or (self._receptive is not None and len(rows) >= self._receptive)

    def drop(self, slot: int) -> None:
        """Forgets what is left to do for a slot."""
        self._left.pop(slot, None)

    def run(self, budget_s: float) -> tuple[int, ...]:
        """Advances rebuilds for about `budget_s`, one frame at least; returns the slots that are done."""
        started, done = self._clock(), []
        while self._left:
            slots = self._company(budget_s)
            frames, outputs = self._stretch(slots, budget_s)
            before = self._clock()
            rows = [[self._left[slot].popleft() for _ in range(frames)] for slot in slots]
            self._lane.replay(slots, np.array(rows), outputs=outputs)
            took = self._clock() - before
            each = took / (frames * len({slot // self._lane.group for slot in slots}))
            # It goes behind frames, and what it took holds their turns as well: the shortest is what it takes.
            self._group_s = each if self._group_s is None or each < self._group_s else 0.9 * self._group_s + 0.1 * each
            for slot in slots:
                if not self._left[slot]:
                    del self._left[slot]
                    done.append(slot)
            if self._clock() - started + took > budget_s:
                break
        return tuple(done)

    def _stretch(self, slots: Sequence[int], budget_s: float) -> tuple[int, bool]:
        """How many frames these slots advance by, and whether in full."""
        left = min(len(self._left[slot]) for slot in slots)
        outputs = left <= HEARD_FRAMES
        groups = len({slot // self._lane.group for slot in slots})
        fit = 1 if self._group_s is None else max(1, int(budget_s / max(self._group_s * groups, 1e-6)))
        return min(self._lane.run_most, fit, left if outputs else left - HEARD_FRAMES), outputs

    def _company(self, budget_s: float) -> list[int]:
        """Who advances together: whole groups, first come first, as many as a frame fits into the budget for."""
        groups = list(dict.fromkeys(slot // self._lane.group for slot in self._left))
        fit = 1 if self._group_s is None else max(1, int(budget_s / max(self._group_s, 1e-6)))
        chosen = set(groups[:fit])
        return [slot for slot in self._left if slot // self._lane.group in chosen]

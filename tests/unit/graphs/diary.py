"""What tests of rebuilding keep of a conversation, and how they feed it. Also imported where there is torch alone."""

from __future__ import annotations

import numpy as np

from graphs.prefill_budget import PrefillBudget
from graphs.slot_engine import DEFAULT_TILE, StepOut
from graphs.stages import Past


class Diary:
    """What a journal keeps of one slot."""

    def __init__(self) -> None:
        self.first_row = 0
        self.rows: list[np.ndarray] = []
        self.pending: np.ndarray | None = None

    def note(self, out: StepOut, i: int = 0) -> np.ndarray:
        """Takes entry i of a step; returns its frame."""
        self.rows.append(out.journal[i])
        self.pending = out.next_columns[i]
        first_row = int(out.first_rows[i])
        del self.rows[: first_row - self.first_row]
        self.first_row = first_row
        return out.tokens[i]

    def past(self) -> Past:
        rows = np.stack(self.rows) if self.rows else np.zeros((0, 17), dtype=np.int16)
        return Past(rows, self.first_row, self.pending)


class Chunks(PrefillBudget):
    """The same number of rows in every step. The tile stays: it is part of an engine's numerics_id, chunks are not."""

    def __init__(self, rows: int) -> None:
        super().__init__(DEFAULT_TILE)
        self._rows = rows

    def rows(self, live: int, *, anybody_live: bool = True, left_ms: float | None = None) -> int:
        return self._rows

"""Consecutive rows of one slot in a step, and the blocks in which rings are counted."""

from __future__ import annotations

from dataclasses import dataclass

KEY_BLOCK = 128  # rings are whole blocks of keys: few shapes, and sums of one order; a page of a pool is one, too


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one slot in a step: row start + i is position first + i."""

    start: int
    count: int
    slot: int
    first: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1

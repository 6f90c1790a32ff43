"""Pages of the KV cache: which are free, and which ring holds which. Nobody else counts them.

A page is KEY_BLOCK positions of one ring, in all layers. A ring takes pages as its conversation grows and gives them
back when it ends, so that more conversations can be held than there are full contexts (`kv_overcommit`). That pages run
short is foreseen in graphs.kv_pressure; here a ring gets them or does not.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graphs.spans import KEY_BLOCK, Span, round_up

NO_PAGE = -1


class OutOfPages(RuntimeError):
    """No page is left for positions that are to be written: a conversation has to go elsewhere, or to be parked."""


class PagePool:
    """`pages` pages for `rings` rings of up to `blocks` pages each. The lowest free page goes first.

    table [rings, blocks] int32: the page that holds positions p with (p % capacity) // KEY_BLOCK = column, or NO_PAGE.
    changed: set whenever the table is; whoever keeps a copy of it elsewhere clears it.
    """

    def __init__(self, pages: int, rings: int, blocks: int) -> None:
        """Raises ValueError for fewer pages than one ring needs: then nobody could ever have a full context."""
        if pages < blocks:
            raise ValueError(f"{pages} pages hold less than one full context, which takes {blocks}: overcommit less")
        self.pages = pages
        self.blocks = blocks
        self.table: npt.NDArray[np.int32] = np.full((rings, blocks), NO_PAGE, dtype=np.int32)
        self.changed = True
        self._free = list(range(pages))  # a heap; a sorted list is one

    @property
    def free(self) -> int:
        return len(self._free)

    def held(self, ring: int) -> int:
        """Pages of one ring."""
        return int((self.table[ring] != NO_PAGE).sum())

    def missing(self, ring: int, first: int, count: int) -> int:
        """Pages that positions first … first + count - 1 of a ring still lack."""
        return len(self._lacking(ring, first, count))

    def cover(self, spans: Sequence[Span]) -> None:
        """Gives every position of a step its page. Raises OutOfPages, and then gives none."""
        wanted = [(span.slot, block) for span in spans for block in self._lacking(span.slot, span.first, span.count)]
        wanted = list(dict.fromkeys(wanted))  # two spans of a ring may meet in a page
        if len(wanted) > len(self._free):
            raise OutOfPages(f"a step needs {len(wanted)} pages of {KEY_BLOCK} frames, {len(self._free)} are free")
        for ring, block in wanted:
            self.table[ring, block] = heapq.heappop(self._free)
            self.changed = True

    def release(self, ring: int) -> int:
        """Takes a ring's pages back; returns how many. Releasing a ring that holds none is no error."""
        row = self.table[ring]
        pages = row[row != NO_PAGE].tolist()
        for page in pages:
            heapq.heappush(self._free, page)
        row[:] = NO_PAGE
        self.changed = self.changed or bool(pages)
        return len(pages)

    def of(self, ring: int, blocks: int) -> npt.NDArray[np.int64]:
        """The pages of a ring's first `blocks` blocks, page 0 where it has none (whose keys nobody then looks at)."""
        pages: npt.NDArray[np.int64] = np.maximum(self.table[ring, :blocks], 0).astype(np.int64)
        return pages

    def _lacking(self, ring: int, first: int, count: int) -> list[int]:
        if count <= 0:
            return []
        last = min(first + count, first + self.blocks * KEY_BLOCK) - 1
        touched = range(first // KEY_BLOCK, last // KEY_BLOCK + 1)
        row = self.table[ring]
        return [column for block in touched if row[column := block % self.blocks] == NO_PAGE]


def pages_for(positions: int, blocks: int) -> int:
    """Pages that a ring of `blocks` blocks holds once so many positions have been written."""
    return min(round_up(positions, KEY_BLOCK) // KEY_BLOCK, blocks)


def pool_size(rings: int, blocks: int, overcommit: float) -> int:
    """Pages that `rings` rings share when `overcommit` times as much is promised as there is; never less than one
    ring's. Raises ValueError for an overcommit below 1."""
    if overcommit < 1.0:
        raise ValueError(f"kv_overcommit is {overcommit}: 1 reserves full contexts, more promises more than there is")
    return max(blocks, int(rings * blocks / overcommit + 1e-6))  # a whole pool for 1.0 and a hair

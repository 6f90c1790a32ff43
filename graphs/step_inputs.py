"""What a step of fixed shape is told, in one buffer of 32-bit words: one copy to the device a frame.

Three tables lie end to end: the rows to read, the blocks of rows that attend together, the rows that tokens are drawn
from. Unused lines are padding: rows at position -1, blocks of no rows, draws from row 0 that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.kv_cache import Span
from graphs.sampling import SamplingRows, row_keys
from models.config import AUDIO_CODEBOOKS, STREAMS

QUERY_ROWS = 16  # rows of one slot that share a reading of its keys: the least that a tensor core takes

# Columns of a row: 17 tokens, then
SLOT, POSITION, GIVEN_EMBEDDING = STREAMS, STREAMS + 1, STREAMS + 2
ROW_WIDTH = STREAMS + 3
# Columns of a block: start row, rows, slot, first position.
BLOCK_WIDTH = 4
# Columns of a draw. A temperature is the bits of an fp32, a key two words, low first.
SOURCE, TEXT, AUDIO, KEY, GIVEN = 0, 1, 3, 5, 7
DRAW_WIDTH = GIVEN + 1 + AUDIO_CODEBOOKS

Words = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Draws:
    """The rows that tokens are drawn from: row numbers [n], given tokens [n, 9] (-2: the model chooses), parameters."""

    rows: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    sampling: SamplingRows


@dataclass(frozen=True)
class Shape:
    """A step's fixed counts. draws may be 0: a step that only fills caches runs no heads."""

    rows: int
    blocks: int
    draws: int

    @property
    def words(self) -> int:
        return self.rows * ROW_WIDTH + self.blocks * BLOCK_WIDTH + self.draws * DRAW_WIDTH

    def split(self, buffer: Any) -> tuple[Any, Any, Any]:
        """Views of a buffer's beginning (numpy or torch): rows, blocks, draws."""
        rows, blocks = self.rows * ROW_WIDTH, self.blocks * BLOCK_WIDTH
        return (
            buffer[:rows].reshape(self.rows, ROW_WIDTH),
            buffer[rows : rows + blocks].reshape(self.blocks, BLOCK_WIDTH),
            buffer[rows + blocks : self.words].reshape(self.draws, DRAW_WIDTH),
        )


class StepInputs:
    """The buffer on both sides: filled on the host, copied, read on the device through views that never move."""

    def __init__(self, largest: Shape, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = torch.zeros(largest.words, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(largest.words, dtype=torch.int32, device=device)
        self._words: Words = self._host.numpy()

    def views(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """On the device: rows [n, 20], blocks [n, 4], draws [n, 16], int32."""
        rows, blocks, draws = shape.split(self._device)
        return rows, blocks, draws

    def fill(
        self,
        shape: Shape,
        tokens: npt.NDArray[np.integer[Any]],
        spans: Sequence[Span],
        draws: Draws,
        given_embeddings: Sequence[tuple[int, int]],
    ) -> None:
        """Writes one step and starts its copy. given_embeddings: start and count of rows whose embedding is given.

        The step before must have been waited for: its copy may still read the host's side.
        """
        rows, blocks, asked = shape.split(self._words)
        rows[:, :STREAMS], rows[:, SLOT], rows[:, POSITION], rows[:, GIVEN_EMBEDDING] = -1, 0, -1, 0
        rows[: len(tokens), :STREAMS] = tokens
        blocks[:] = 0
        block = 0
        for span in spans:
            covered = slice(span.start, span.start + span.count)
            rows[covered, SLOT] = span.slot
            rows[covered, POSITION] = np.arange(span.first, span.first + span.count)
            for done in range(0, span.count, QUERY_ROWS):
                blocks[block] = (span.start + done, min(QUERY_ROWS, span.count - done), span.slot, span.first + done)
                block += 1
        for start, count in given_embeddings:
            rows[start : start + count, GIVEN_EMBEDDING] = 1
        _fill_draws(asked, draws)
        self._device[: shape.words].copy_(self._host[: shape.words], non_blocking=True)


def blocks_of(spans: Sequence[Span]) -> int:
    return sum(-(-span.count // QUERY_ROWS) for span in spans)


def _fill_draws(asked: Words, draws: Draws) -> None:
    count, sampling = len(draws.rows), draws.sampling
    asked[:] = 0
    asked[:, [TEXT + 1, AUDIO + 1]] = 1  # a padding line's top-k
    if not count:
        return
    asked[:count, SOURCE] = draws.rows
    asked[:count, TEXT] = sampling.text_temperature.view(np.int32)
    asked[:count, TEXT + 1] = sampling.text_top_k
    asked[:count, AUDIO] = sampling.audio_temperature.view(np.int32)
    asked[:count, AUDIO + 1] = sampling.audio_top_k
    asked[:count, KEY : KEY + 2] = row_keys(sampling).view(np.int32).reshape(-1, 2)  # little-endian: low word first
    asked[:count, GIVEN:] = draws.given

"""What one step of the slot engine takes and gives: rows of many conversations, and what was drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.conversation import Conversation, Fill
from graphs.frame_step import Emit, Override
from graphs.kv_cache import Span
from models.prompt import Tokens


class StepOut(NamedTuple):
    """tokens [n, 9]: text and agent codes of the frames just heard; journal [n, 17]: the columns read.

    ready: slots whose prompt is now in the cache; pending: slots still being prefilled.
    next_columns [n, 17]: the columns begun, -2 where the next frame will tell.
    first_rows [n] int32: the oldest frame whose column a rebuild needs, 0 before the first anchor.
    """

    tokens: npt.NDArray[np.int16]
    journal: npt.NDArray[np.int16]
    ready: tuple[int, ...]
    pending: int
    next_columns: npt.NDArray[np.int16]
    first_rows: npt.NDArray[np.int32]


class Batch:
    """The rows of one step, and what is drawn from them."""

    def __init__(self) -> None:
        self.rows: list[Tokens] = []
        self.spans: list[Span] = []
        self.emits: list[Emit] = []
        self.overrides: list[Override] = []

    def add(self, talk: Conversation, fill: Fill, count: int) -> int:
        """Takes the next `count` columns of a ring; returns the last one's row."""
        start, first = len(self.rows), fill.filled
        self.spans.append(Span(start, count, fill.ring, first))
        embeddings = talk.prompt.embeddings
        if embeddings is not None and first < len(embeddings):
            self.overrides.append(Override(start, embeddings[first : first + count]))
        self.rows.extend(talk.columns(fill, count))
        fill.filled += count
        return len(self.rows) - 1


def nothing(width: int) -> npt.NDArray[np.int16]:
    return np.zeros((0, width), dtype=np.int16)


def stacked(rows: Sequence[Tokens], width: int) -> npt.NDArray[np.int16]:
    return np.stack(rows) if rows else nothing(width)

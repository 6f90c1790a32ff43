"""One conversation as the slot engine holds it: what it has read, what it reads next, and which ring holds its keys."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphs.anchors import AnchorPlan
from graphs.frame_step import GENERATED, Emit
from graphs.prefix_cache import PrefixOwners
from graphs.stages import Codes, Past, Sampling
from models.config import AUDIO_CODEBOOKS, NO_INPUT, STREAMS, UNGENERATED, LMConfig
from models.prompt import USER, Prompt, Tokens


@dataclass
class Fill:
    """A ring of the cache, of which positions 0 … filled - 1 are written: the prompt, then frames from `first_row` on.

    `filled` counts rows that are in a step already, and may be running.
    """

    ring: int
    first_row: int
    filled: int = 0


@dataclass
class Conversation:
    """Frames count from 0 after the prompt. `frame` is the next one; `pending` [17] is its column as far as known, -2
    elsewhere, and None until the row before it has been run."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    fill: Fill
    owners: PrefixOwners
    plan: AnchorPlan | None = None
    frame: int = 0
    pending: Tokens | None = None
    user_before: Codes | None = None  # of the last row, where `pending` is to be drawn again
    upcoming: Fill | None = None  # the ring being filled for the next anchor
    live: bool = False
    rebuildable: bool = False  # whether all rows are kept that a rebuild of its ring would want
    _rows: list[Tokens] = field(default_factory=list)  # frames frame - len … frame - 1

    def restore(self, past: Past) -> None:
        """Takes over what a journal knows; to be called once, before anything is run."""
        self._rows = list(past.rows)
        self.frame = past.first_row + len(past.rows)
        self.pending = None if past.pending is None else past.pending.astype(np.int16)
        self.user_before = past.user_before
        if self.frame == 0:
            self.pending = None  # drawn after the prompt
        self.fill.first_row = self._anchored(past.first_row)

    def park(self) -> None:
        """Forgets what its ring holds: the same ring is to be filled again from its prompt and rows."""
        self.fill = Fill(self.fill.ring, self._anchored(self.fill.first_row))
        self.upcoming, self.live = None, False

    def _anchored(self, first_row: int) -> int:
        """Where a ring that is filled now begins. An anchor due with the very next frame is done already. Not if the
        last row's tokens are still to be drawn: that row belongs to the ring before the anchor."""
        while self.plan is not None and self.pending is not None and self.plan.next(first_row) <= self.frame:
            first_row = self.plan.next(first_row) - self.plan.keep
        return first_row

    @property
    def anchor(self) -> int | None:
        """The frame of the next anchor."""
        return None if self.plan is None else self.plan.next(self.fill.first_row)

    def known(self, fill: Fill) -> int:
        """Positions of `fill` whose column is known by now."""
        return self.prompt.frames + self.frame - fill.first_row

    def missing(self, fill: Fill) -> int:
        return self.known(fill) - fill.filled

    def read(self, row: Tokens) -> None:
        """Notes the column of frame `frame`. Rows that no rebuild of a ring can need are forgotten."""
        self.frame += 1
        self._rows.append(row)
        if self.live:
            needed = 1 if self.plan is None else self.plan.keep
            if self.rebuildable:
                needed = max(needed, self.frame - self.fill.first_row)
            del self._rows[: max(0, len(self._rows) - needed)]

    def columns(self, fill: Fill, count: int) -> list[Tokens]:
        """The next `count` columns that `fill` wants."""
        prompt, first = self.prompt.columns, fill.filled
        part = list(prompt[first : first + count])
        if len(part) < count:
            frame = fill.first_row + max(0, first - len(prompt))
            start = frame - (self.frame - len(self._rows))
            if start < 0:
                raise RuntimeError(f"frame {frame} is needed to fill a ring, but was forgotten")
            part += self._rows[start : start + count - len(part)]
        return part

    def emit_live(self, row: int) -> Emit:
        """What to draw after the column of the frame that `read` has just noted."""
        free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
        return Emit(row, self._column, free, self.sampling, self.seed)

    def emit_last(self, row: int) -> Emit:
        """What to draw after the last row of a prefill: what the prompt does not say, or the journal did not keep."""
        if self.frame > 0:
            return self.emit_live(row)
        return Emit(row, self._column, self.prompt.given[:GENERATED], self.sampling, self.seed)

    def draw(self, config: LMConfig, drawn: Tokens, user: Codes | None) -> None:
        """Begins the next column with tokens [9] and the codes [8] of the frame just heard (None: the prompt's)."""
        pending = self.prompt.given.copy()
        pending[:GENERATED] = drawn
        if user is not None:
            delayed = np.array(config.delays[USER]) > 0
            pending[USER] = np.where(delayed, user, UNGENERATED)
        self.pending = pending

    @property
    def _column(self) -> int:
        """The column being filled, counted as if there were no anchors: the sampling counter never repeats."""
        return self.prompt.frames + self.frame


def check_past(config: LMConfig, past: Past) -> None:
    """Raises ValueError for a past that no conversation of this model can have had."""
    rows, pending, user = past.rows, past.pending, past.user_before
    if rows.ndim != 2 or rows.shape[1] != STREAMS or past.first_row < 0:
        raise ValueError(f"a journal's rows are [n, {STREAMS}] from frame 0 or later, not {list(rows.shape)}")
    if pending is not None and pending.shape != (STREAMS,):
        raise ValueError(f"a pending column is [{STREAMS}], not {list(pending.shape)}")
    if pending is None and len(rows) and (user is None or user.shape != (AUDIO_CODEBOOKS,)):
        raise ValueError("a journal without its pending column needs the user's codes [8] of its last frame")
    if len(rows) == 0 and past.first_row > 0:
        raise ValueError(f"a journal that begins at frame {past.first_row} has rows from there on")
    most = np.array([config.text_card] + [config.card] * (STREAMS - 1))
    drawn = (
        rows if pending is None else np.concatenate([rows, np.where(pending == UNGENERATED, NO_INPUT, pending)[None]])
    )
    if (drawn < NO_INPUT).any() or (drawn > most).any():
        raise ValueError("the journal has tokens that this model does not know")
    if pending is not None and len(rows) and (pending[:GENERATED] < 0).any():
        raise ValueError("the pending column lacks tokens that were drawn for it")
    if user is not None and ((user < NO_INPUT) | (user >= config.card)).any():
        raise ValueError("the journal has user codes that this model does not know")

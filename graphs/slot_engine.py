"""The slot engine: which slot reads which column next, prompts prefilled beside live frames.

Slots are plain numbers here; who owns one, and in which order frames may come, is the business of `actors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.backends import make_cache
from graphs.frame_step import GENERATED, Emit, FrameStep, Override
from graphs.kv_cache import Span
from graphs.stages import Codes, Sampling
from models.config import AUDIO_CODEBOOKS, STREAMS, UNGENERATED
from models.lm import LanguageModel
from models.prompt import USER, Prompt, Tokens, next_column

DEFAULT_TILE = 64  # prefill rows in a step: a multiple of four; larger delays live frames, smaller wastes weight reads


class StepOut(NamedTuple):
    """tokens [n, 9]: text and agent codes of the frames just heard; journal [n, 17]: the columns read.

    ready: slots whose prompt is now in the cache; pending: slots still being prefilled.
    """

    tokens: npt.NDArray[np.int16]
    journal: npt.NDArray[np.int16]
    ready: tuple[int, ...]
    pending: int


@dataclass
class _Conversation:
    """What one slot knows between steps."""

    prompt: Prompt
    sampling: Sampling
    seed: int
    position: int = 0  # the next column to read
    pending: Tokens = field(default_factory=lambda: np.full(STREAMS, UNGENERATED, dtype=np.int16))
    user_before: Codes = field(default_factory=lambda: np.zeros(AUDIO_CODEBOOKS, dtype=np.int16))

    @property
    def live(self) -> bool:
        return self.position >= self.prompt.frames


class SlotEngine:
    """All slots of one model. One call of `step` is one frame for every slot named, plus a tile of prefill."""

    def __init__(self, model: LanguageModel, slots: int, *, tile: int = DEFAULT_TILE, backend: str = "auto") -> None:
        """Reserves full contexts for `slots` conversations on the model's device."""
        self._model = model
        self.slots = slots
        self._tile = tile
        self.cache = make_cache(model.config, slots, tile, device=model.device, dtype=model.dtype, backend=backend)
        fixed = model.device.type == "cuda"
        self.frame_step = FrameStep(
            model, self.cache, fixed_rows=slots + tile if fixed else 0, fixed_emits=slots if fixed else 0
        )
        self._open: dict[int, _Conversation] = {}
        self._prefilling: list[int] = []  # in order of arrival

    @property
    def prompt_limit(self) -> int:
        """A prompt longer than the window would have lost its beginning before the first word is spoken."""
        return self._model.config.window

    def open(self, slot: int, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        """Gives a slot to a new conversation; its prompt is prefilled by the steps to come.

        Raises ValueError if the slot is taken, does not exist, or the prompt is too long.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} does not exist, this engine has {self.slots}")
        if slot in self._open:
            raise ValueError(f"slot {slot} is taken")
        if prompt.frames > self.prompt_limit:
            raise ValueError(
                f"voice and role together take {prompt.frames} frames of 80 ms, this model has room for "
                f"{self.prompt_limit}: shorten the role by some {prompt.frames - self.prompt_limit} tokens"
            )
        self._open[slot] = _Conversation(prompt, sampling, seed)
        self._prefilling.append(slot)

    def close(self, slot: int) -> None:
        """Frees a slot, whatever it was doing. Its cache needs no clearing: a key is only seen by position."""
        if self._open.pop(slot, None) is not None and slot in self._prefilling:
            self._prefilling.remove(slot)

    def step(self, slots: Sequence[int], codes: npt.NDArray[np.int16]) -> StepOut:
        """One frame for each live slot of `slots` (each at most once), and one tile of waiting prompts.

        codes: [n, 8] int16, what the user said, as Mimi codes (-1: no input).
        Raises ValueError if a slot is not live.
        """
        for slot in slots:
            if slot not in self._open or not self._open[slot].live:
                raise ValueError(f"slot {slot} has no live conversation: wait until it is reported ready")
        rows, spans, emits = self._live_rows(slots, codes)
        overrides, finishing = self._prefill_rows(rows, spans, emits)
        if not rows:
            return StepOut(_none(GENERATED), _none(STREAMS), (), len(self._prefilling))
        drawn = self.frame_step.run(np.stack(rows), spans, emits, overrides)
        frames = [self._advance(slot, drawn[i], codes[i]) for i, slot in enumerate(slots)]
        for i, slot in enumerate(finishing, start=len(slots)):
            self._advance(slot, drawn[i], self._open[slot].prompt.given[USER])
        tokens = np.stack(frames) if frames else _none(GENERATED)
        journal = np.stack(rows[: len(slots)]) if slots else _none(STREAMS)
        return StepOut(tokens, journal, tuple(finishing), len(self._prefilling))

    def _live_rows(
        self, slots: Sequence[int], codes: npt.NDArray[np.int16]
    ) -> tuple[list[Tokens], list[Span], list[Emit]]:
        rows: list[Tokens] = []
        spans: list[Span] = []
        emits: list[Emit] = []
        free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
        for i, slot in enumerate(slots):
            talk = self._open[slot]
            rows.append(next_column(self._model.config, talk.pending, codes[i], talk.user_before))
            spans.append(Span(i, 1, slot, talk.position))
            emits.append(Emit(i, talk.position + 1, free, talk.sampling, talk.seed))
        return rows, spans, emits

    def _prefill_rows(
        self, rows: list[Tokens], spans: list[Span], emits: list[Emit]
    ) -> tuple[list[Override], list[int]]:
        """Adds up to a tile of prompt columns, first come first served; returns the slots that finish."""
        overrides: list[Override] = []
        finishing: list[int] = []
        budget = self._tile
        for slot in list(self._prefilling):
            if budget == 0:
                break
            talk = self._open[slot]
            prompt, first = talk.prompt, talk.position
            count = min(budget, prompt.frames - first)
            spans.append(Span(len(rows), count, slot, first))
            if prompt.embeddings is not None and first < len(prompt.embeddings):
                overrides.append(Override(len(rows), prompt.embeddings[first : first + count].to(self._model.dtype)))
            rows.extend(prompt.columns[first : first + count])
            budget -= count
            talk.position = first + count - 1  # the last one is counted when its tokens are in, as for a live frame
            if first + count == prompt.frames:
                emits.append(Emit(len(rows) - 1, prompt.frames, prompt.given[:GENERATED], talk.sampling, talk.seed))
                self._prefilling.remove(slot)
                finishing.append(slot)
            else:
                talk.position += 1
        return overrides, finishing

    def _advance(self, slot: int, drawn: Tokens, user: Codes) -> Tokens:
        """Takes what was drawn after a column; returns the frame that became complete with it: [9].

        The text and the undelayed codebook of that frame were drawn a step ago, the delayed ones just now. The
        published code answers a call later, with the same tokens: it reads a column only when the next frame is in.
        """
        talk = self._open[slot]
        delayed = np.array(self._model.config.delays[:GENERATED]) > 0
        frame = np.where(delayed, drawn, talk.pending[:GENERATED]).astype(np.int16)
        talk.pending[:GENERATED] = drawn
        talk.user_before = user.astype(np.int16)
        talk.position += 1
        return frame


def _none(width: int) -> npt.NDArray[np.int16]:
    return np.zeros((0, width), dtype=np.int16)

"""The frame step: one pass over rows of many slots, then one frame of tokens for each row that asks for it.

embed → temporal layers → text sample → eight depth steps with audio samples → write back. Within the 80 ms of a
frame this is the largest part; encode and decode of the codec come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.attention import ROW_PAD
from graphs.backends import Backends
from graphs.kv_cache import KVCache, Span, round_up
from graphs.sampling import SamplingRows, make_sampler
from graphs.stages import Sampling
from graphs.step_inputs import Draws
from graphs.step_model import LogitsProbe, StepModel, WholeStep, step_model
from models.config import AUDIO_CODEBOOKS
from models.lm import LanguageModel

GENERATED = 1 + AUDIO_CODEBOOKS  # text and the agent's codes


@dataclass(frozen=True)
class Emit:
    """A row from which the next column's text and agent tokens are drawn.

    row: index into the step's rows; column: the column being filled (the sampling counter);
    given: [9] int16, tokens that are known already, -2 where the model chooses.
    """

    row: int
    column: int
    given: npt.NDArray[np.int16]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Override:
    """Rows whose input embedding is given (a published voice prompt): rows start.. take embeddings [n, dim]."""

    start: int
    embeddings: Tensor


class FrameStep:
    """Runs rows through the model. Holds no conversation's state but the KV cache, which rows address by slot."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KVCache,
        *,
        fixed_rows: int = 0,
        fixed_emits: int = 0,
        backends: Backends | None = None,
    ) -> None:
        """fixed_rows, fixed_emits: pad every step to these counts, 0 to fours. A WholeStep has counts of its own.

        backends: whose products and attention; None is ours.
        """
        self._cache = cache
        self._model = step_model(model, cache, backends)
        self._fixed_rows = fixed_rows
        self._fixed_emits = fixed_emits
        self.probe: LogitsProbe | None = None

    @torch.inference_mode()
    def run(
        self,
        tokens: npt.NDArray[np.int16],
        spans: Sequence[Span],
        emits: Sequence[Emit],
        overrides: Sequence[Override] = (),
    ) -> npt.NDArray[np.int16]:
        """tokens: [rows, 17] input columns; spans lie end to end from row 0 on. Returns [emits, 9] int16.

        Raises graphs.paging.OutOfPages, before anything is run, if keys are in pages and too few are free.
        """
        self._cache.cover(spans)
        if isinstance(self._model, WholeStep):
            given = [(o.start, o.embeddings) for o in overrides]
            return self._model.frame(tokens, spans, draws_of(emits), given, self.probe)
        model, count = self._model, tokens.shape[0]
        rows = max(self._fixed_rows, round_up(count, ROW_PAD))
        padded = np.full((rows, tokens.shape[1]), -1, dtype=np.int64)
        padded[:count] = tokens
        positions = np.zeros(rows, dtype=np.int64)
        for span in spans:
            positions[span.start : span.start + span.count] = np.arange(span.first, span.first + span.count)
        hidden = model.hidden(padded, positions, spans, [(o.start, o.embeddings) for o in overrides])
        if not emits:
            return np.zeros((0, GENERATED), dtype=np.int16)
        return self._emit(model, hidden, emits)

    def _emit(self, model: StepModel, hidden: Tensor, emits: Sequence[Emit]) -> npt.NDArray[np.int16]:
        device, count = hidden.device, len(emits)
        padded = [*emits, *([emits[-1]] * (max(self._fixed_emits, round_up(count, ROW_PAD)) - count))]
        hidden = hidden[torch.tensor([emit.row for emit in padded], device=device)]
        given = torch.from_numpy(np.stack([emit.given for emit in padded]).astype(np.int64)).to(device)
        sampler = make_sampler(sampling_rows(padded), device)

        text_logits = model.text_logits(hidden)
        drawn = sampler.draw(text_logits, 0)
        token = torch.where(given[:, 0] >= 0, given[:, 0], drawn)
        out, audio_logits = [token], []
        depth = model.depth(hidden)
        for codebook in range(AUDIO_CODEBOOKS):
            logits = depth.logits(codebook, token)
            drawn = sampler.draw(logits, codebook + 1)
            known = given[:, codebook + 1]
            token = torch.where(known >= 0, known, drawn)
            out.append(token)
            if self.probe is not None:
                audio_logits.append(logits)
        if self.probe is not None:
            self.probe(text_logits[:count], torch.stack(audio_logits, dim=1)[:count])
        result: npt.NDArray[np.int16] = torch.stack(out, dim=1)[:count].to(torch.int16).cpu().numpy()
        return result


def draws_of(emits: Sequence[Emit]) -> Draws:
    given = np.array([emit.given for emit in emits], dtype=np.int64).reshape(len(emits), GENERATED)
    return Draws(np.array([emit.row for emit in emits], dtype=np.int64), given, sampling_rows(emits))


def sampling_rows(emits: Sequence[Emit]) -> SamplingRows:
    """Gathers the emits' sampling parameters, a row each."""
    samplings = [emit.sampling for emit in emits]
    return SamplingRows(
        text_temperature=np.array([sampling.text_temperature for sampling in samplings], dtype=np.float32),
        text_top_k=np.array([sampling.text_top_k for sampling in samplings], dtype=np.int64),
        audio_temperature=np.array([sampling.audio_temperature for sampling in samplings], dtype=np.float32),
        audio_top_k=np.array([sampling.audio_top_k for sampling in samplings], dtype=np.int64),
        seed=np.array([emit.seed for emit in emits], dtype=np.int64),
        column=np.array([emit.column for emit in emits], dtype=np.int64),
    )

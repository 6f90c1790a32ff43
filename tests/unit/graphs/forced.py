"""The golden conversation with every token given: logits of all columns, to measure what a number format costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import KVCache, Span
from models.lm import LanguageModel
from models.prompt import next_column
from tests.golden import GREEDY, golden_lm, golden_prompt, golden_run, golden_user


def golden_lm_on(device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A copy of the golden model on `device`; on the CPU in fp32 the shared one."""
    if device.type == "cpu" and dtype == torch.float32:
        return golden_lm()
    model = LanguageModel(golden_lm().config, dtype=dtype)
    model.load_state_dict(golden_lm().state_dict())
    return model.to(device)


def forced_columns(model: LanguageModel) -> np.ndarray:
    """[132, 17] int16: the prompt, then 100 frames as the published code spoke them."""
    prompt, expected, user = golden_prompt(), golden_run()["expected_tokens"].numpy(), golden_user()
    pending = np.full(17, -2, dtype=np.int16)
    delayed = np.array(model.config.delays[:GENERATED]) > 0
    columns, before = list(prompt.columns), prompt.given[GENERATED:].astype(np.int16)
    for frame in range(98):
        now, earlier = expected[frame + 1, :GENERATED], expected[frame, :GENERATED]
        pending[:GENERATED] = np.where(delayed, earlier, now)
        columns.append(next_column(model.config, pending, user[frame], before))
        before = user[frame]
    return np.stack(columns).astype(np.int16)


def forced_logits(model: LanguageModel, cache: KVCache, chunks: Sequence[int] = (1,)) -> tuple[Tensor, Tensor]:
    """Text [columns, card] and audio [columns, 8, card] logits of slot 0; a chunk's last row is the one that is drawn.

    The tokens that the depth transformer sees are the ones given, too.
    """
    step = FrameStep(model, cache)
    text: list[Tensor] = []
    audio: list[Tensor] = []
    step.probe = lambda t, a: (text.append(t[0].float().cpu()), audio.append(a[0].float().cpu()))[0]
    columns = forced_columns(model)
    first = turn = 0
    while first < len(columns) - 1:
        count = min(chunks[turn % len(chunks)], len(columns) - 1 - first)
        last = first + count - 1
        emit = Emit(count - 1, last + 1, columns[last + 1][:GENERATED].clip(min=0), GREEDY, 0)
        step.run(columns[first : last + 1], [Span(0, count, 0, first)], [emit])
        first, turn = last + 1, turn + 1
    return torch.stack(text), torch.stack(audio)

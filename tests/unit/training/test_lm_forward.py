"""The training forward and the served arithmetic are one model: equal logits on random weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from graphs.backends import make_cache
from graphs.frame_step import Emit, FrameStep
from graphs.kv_cache import Span
from graphs.stages import Sampling
from models.config import LMConfig
from models.lm import LanguageModel
from training.lm_forward import forward, initialise

CONFIG = LMConfig(
    dim=32, text_card=40, dep_q=8, card=24, num_heads=2, num_layers=2, hidden_scale=4.0, context=13,
    depformer_dim=16, depformer_dim_feedforward=48, depformer_num_heads=2, depformer_num_layers=2,
)  # fmt: skip


@pytest.fixture(name="model")
def _model() -> LanguageModel:
    model = LanguageModel(CONFIG)
    initialise(model, torch.Generator().manual_seed(1))
    return model.eval()


class TestForward:
    @pytest.mark.parametrize("time", [9, 30])  # within the window, and wrapping it twice
    def test_equals_the_served_step_frame_by_frame(self, model: LanguageModel, time: int) -> None:
        rng = np.random.default_rng(2)
        columns = np.concatenate(
            [rng.integers(0, CONFIG.text_card, (time, 1)), rng.integers(0, CONFIG.card, (time, 16))], axis=1
        ).astype(np.int16)
        cache = make_cache(CONFIG, 1, 4, device=torch.device("cpu"), dtype=torch.float32)
        step = FrameStep(model, cache)
        text, audio = [], []

        def keep(text_logits: torch.Tensor, audio_logits: torch.Tensor) -> None:
            text.append(text_logits[0])
            audio.append(audio_logits[0])

        step.probe = keep
        for position in range(time - 1):
            # The next column's tokens are given, so the served step walks the same codes.
            emit = Emit(0, position + 1, columns[position + 1, :9], Sampling(), 0)
            step.run(columns[position : position + 1], [Span(0, 1, 0, position)], [emit])

        batch = torch.from_numpy(columns.astype(np.int64))[None].repeat(2, 1, 1)
        rows = torch.arange(time - 1) + time  # the second of two sequences
        with torch.no_grad():
            logits = forward(model, batch, rows)

        assert torch.allclose(logits.text, torch.stack(text), atol=2e-5)
        assert torch.allclose(logits.audio.transpose(0, 1), torch.stack(audio), atol=2e-5)

    def test_no_input_tokens_contribute_nothing(self, model: LanguageModel) -> None:
        columns = torch.full((1, 3, 17), -1)
        columns[:, :, 0] = 3
        rows = torch.tensor([0, 1])
        changed = dataclasses.replace(CONFIG)
        other = LanguageModel(changed)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for table in other.emb:
                table.weight.mul_(5.0)
            assert torch.equal(forward(model, columns, rows).text, forward(other, columns, rows).text)

    def test_every_parameter_that_serves_gets_a_gradient(self, model: LanguageModel) -> None:
        columns = torch.randint(0, CONFIG.card, (2, 6, 17))
        logits = forward(model, columns, torch.tensor([1, 2, 8]))
        (logits.text.square().mean() + logits.audio.square().mean()).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert without == []

"""The loss that holds no logits against the plain one, and threads that together learn what one would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import TEXT_PAD, LMConfig
from models.lm import LanguageModel
from training.lm_data import NEAR, LMBatch, LMPart
from training.lm_forward import forward, initialise
from training.lm_loss import heads_loss
from training.lm_team import Team, loss_of, means

TINY = LMConfig(
    dim=16, text_card=30, dep_q=8, card=20, num_heads=2, num_layers=1, hidden_scale=4.0, context=64,
    depformer_dim=8, depformer_dim_feedforward=24, depformer_num_heads=2, depformer_num_layers=1,
)  # fmt: skip


def model() -> LanguageModel:
    made = LanguageModel(TINY)
    initialise(made, torch.Generator().manual_seed(1))
    return made


def part(time: int, seed: int) -> LMPart:
    rng = np.random.default_rng(seed)
    columns = torch.from_numpy(rng.integers(4, 20, (1, time, 17)))
    columns[:, ::3, 0] = TEXT_PAD
    weights = torch.from_numpy(rng.uniform(0.1, 1.0, (time - 1, 9)).astype(np.float32))
    return LMPart(columns, columns, torch.arange(time - 1), weights, torch.ones(time - 1, dtype=torch.bool))


def batch() -> LMBatch:
    parts = [part(6 + seed, seed) for seed in range(5)]
    return LMBatch(parts, torch.tensor([7.0, 9.0]))


class TestHeadsLoss:
    def test_equals_cross_entropy_and_its_gradients(self) -> None:
        generator = torch.Generator().manual_seed(4)
        x, weights = torch.randn(3, 7, 5, generator=generator), torch.rand(3, 7, generator=generator)
        heads = [torch.randn(11, 5, generator=generator) for _ in range(3)]
        targets = torch.randint(0, 11, (3, 7), generator=generator)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *heads)]
        total, each = heads_loss(leaves[0], leaves[1:], targets, weights)
        torch.autograd.backward(2.0 * total)

        others = [tensor.clone().requires_grad_() for tensor in (x, *heads)]
        plain = torch.stack(
            [F.cross_entropy(others[0][k] @ others[1 + k].t(), targets[k], reduction="none") for k in range(3)]
        )
        torch.autograd.backward(2.0 * (plain * weights).sum())
        assert torch.allclose(each, plain, atol=1e-6)
        assert float(total.detach()) == pytest.approx(float((plain * weights).sum().detach()), rel=1e-6)
        for own, other in zip(leaves, others, strict=True):
            assert own.grad is not None
            assert other.grad is not None
            assert torch.allclose(own.grad, other.grad, atol=1e-6)
        with torch.no_grad():
            assert torch.allclose(heads_loss(x, heads, targets, weights)[1], plain, atol=1e-6)


class TestLoss:
    def test_equals_the_weighted_means_of_the_logits(self) -> None:
        learner, some = model(), part(9, 0)
        with torch.no_grad():
            total, figures = loss_of(learner, some, torch.tensor([4.0, 8.0]))
            logits = forward(learner, some.columns, some.rows)
        following = some.columns[0, 1:, :9]
        text = F.cross_entropy(logits.text, following[:, 0], reduction="none")
        codes = torch.stack(
            [F.cross_entropy(logits.audio[k], following[:, 1 + k], reduction="none") for k in range(8)], dim=1
        )
        expected = (text * some.weights[:, 0]).sum() / 4 + (codes * some.weights[:, 1:]).sum() / 8
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        told = means(figures)
        assert told["text"] == pytest.approx(float(text.mean()), rel=1e-5)
        assert told["words"] == pytest.approx(float(text[following[:, 0] != TEXT_PAD].mean()), rel=1e-5)
        assert told["semantic"] == pytest.approx(float(codes[:, 0].mean()), rel=1e-5)
        assert told["near"] == pytest.approx(float(codes[:, 1:NEAR].mean()), rel=1e-5)
        assert told["far"] == pytest.approx(float(codes[:, NEAR:].mean()), rel=1e-5)

    def test_far_codes_of_some_rows_stand_for_all(self) -> None:
        learner, some = model(), part(9, 0)
        few = some._replace(chosen=torch.tensor([False, True, False, False, True, False, False, False]))
        with torch.no_grad():
            total, figures = loss_of(learner, few, torch.tensor([4.0, 8.0]))
            logits = forward(learner, some.columns, some.rows)
        following = some.columns[0, 1:, :9]
        text = F.cross_entropy(logits.text, following[:, 0], reduction="none")
        codes = torch.stack(
            [F.cross_entropy(logits.audio[k], following[:, 1 + k], reduction="none") for k in range(8)], dim=1
        )
        counted = codes * some.weights[:, 1:]
        expected = (text * some.weights[:, 0]).sum() / 4
        expected += (counted[:, :NEAR].sum() + 4 * counted[few.chosen, NEAR:].sum()) / 8
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        assert means(figures)["semantic"] == pytest.approx(float(codes[:, 0].mean()), rel=1e-5)
        assert means(figures)["near"] == pytest.approx(float(codes[:, 1:NEAR].mean()), rel=1e-5)
        assert means(figures)["far"] == pytest.approx(float(codes[few.chosen, NEAR:].mean()), rel=1e-5)

    def test_of_rows_without_a_voice_the_text_alone_counts(self) -> None:
        learner, some, totals = model(), part(9, 0), torch.tensor([4.0, 8.0])
        some = some._replace(chosen=torch.tensor([False, True] * 4))
        mute = torch.tensor([True, False, True, True, True, False, False, True])
        columns, weights = some.columns.clone(), some.weights.clone()
        columns[0, 1:, 1:9][mute] = -1
        weights[:, 1:][mute] = 0.0
        with torch.no_grad():
            # The inputs stay: of what they say, the codes that follow are to be told, or not.
            whole, _ = loss_of(learner, some._replace(weights=some.weights * ~mute[:, None]), totals)
            text, _ = loss_of(learner, some._replace(weights=some.weights * mute[:, None] * torch.eye(9)[0]), totals)
            total, figures = loss_of(learner, some._replace(columns=columns, weights=weights), totals)
        assert float(total) == pytest.approx(float(whole + text), rel=1e-5)
        assert figures[:, 1].tolist() == [8, int((columns[0, 1:, 0] != TEXT_PAD).sum()), 3, 9, 8]

    def test_a_lesson_moves_nothing_of_the_voice(self) -> None:
        learner, some = model(), part(9, 0)
        some.weights[:, 1:] = 0.0
        total, figures = loss_of(
            learner, some._replace(chosen=torch.tensor([False, True] * 4)), torch.tensor([4.0, 1.0])
        )
        torch.autograd.backward(total)
        moved = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
        assert "text_linear.weight" in moved
        assert any(name.startswith("transformer.") for name in moved)
        assert not any("depformer" in name or name.startswith("linears") for name in moved)
        assert torch.isfinite(total)
        assert means(figures)["semantic"] == 0.0


class TestTeam:
    @staticmethod
    def _learnt(workers: int, steps: int = 3) -> tuple[dict[str, Tensor], list[float]]:
        learner = model()
        team = Team(learner, workers)
        norms = [team.learn(batch(), 1e-2, 1.0)[1] for _ in range(steps)]
        team.close()
        return dict(learner.state_dict()), norms

    def test_two_threads_learn_what_one_learns(self) -> None:
        one, norms = self._learnt(1)
        two, others = self._learnt(2)
        assert norms == pytest.approx(others, rel=1e-2)  # bf16, added up in another order
        for name, start in model().state_dict().items():
            moved = float((one[name] - start).abs().mean())
            assert float((one[name] - two[name]).abs().mean()) < 0.1 * moved, name

    def test_the_first_step_follows_the_gradient_of_the_whole_batch(self) -> None:
        learner = model()
        for some in batch().parts:
            torch.autograd.backward(loss_of(learner, some, batch().totals)[0])
        square = sum(float(p.grad.square().sum()) for p in learner.parameters() if p.grad is not None)
        assert self._learnt(3, steps=1)[1][0] == pytest.approx(square**0.5, rel=2e-2)

    def test_validation_learns_nothing(self) -> None:
        learner = model()
        before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
        team = Team(learner, 2)
        first, second = team.validate([batch()]), team.validate([batch()])
        team.close()
        assert first == pytest.approx(second, rel=1e-6)
        assert all(torch.equal(tensor, before[name]) for name, tensor in learner.state_dict().items())

    def test_moments_go_on_where_they_were(self) -> None:
        learner = model()
        team = Team(learner, 2)
        team.learn(batch(), 1e-3, 1.0)
        other = Team(model(), 3)
        other.load_moments(team.moments(), 1)
        assert other.moments().keys() == team.moments().keys()
        for name, tensor in team.moments().items():
            assert torch.allclose(other.moments()[name], tensor, rtol=1e-4), name
        team.close()
        other.close()

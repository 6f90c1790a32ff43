"""What carries a run from one piece to the next: sharded states, moments, schedules, the clock."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from training import state
from training.optim import adamw, learning_rate, pack_moments, unpack_moments, without_moments
from training.piece import Piece


class TestState:
    def test_comes_back_as_it_was_in_small_shards(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state, "SHARD_BYTES", 1000)
        tensors = {"big": torch.randn(100, 7), "small": torch.arange(3), "other": torch.randn(60).half()}
        state.save_state(tmp_path, tensors, {"step": 4})
        loaded = state.load_state(tmp_path)
        assert loaded is not None
        assert loaded[1] == {"step": 4}
        assert all(torch.equal(loaded[0][name], tensor) for name, tensor in tensors.items())
        assert len(list(tmp_path.glob("*.safetensors"))) >= 3
        assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2000

    def test_a_newer_one_replaces_it_whole(self, tmp_path: Path) -> None:
        state.save_state(tmp_path, {"a": torch.zeros(2)}, {"step": 1})
        state.save_state(tmp_path, {"a": torch.ones(2)}, {"step": 2})
        loaded = state.load_state(tmp_path)
        assert loaded is not None
        assert loaded[1]["step"] == 2
        assert len(list(tmp_path.glob("*.safetensors"))) == 1

    def test_too_large_to_travel_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state, "TOTAL_BYTES", 100)
        with pytest.raises(ValueError, match="resume state"):
            state.save_state(tmp_path, {"a": torch.zeros(100)}, {})

    def test_nothing_saved_is_none(self, tmp_path: Path) -> None:
        assert state.load_state(tmp_path) is None


class TestMoments:
    def test_rank_one_moments_survive(self) -> None:
        model = nn.Linear(3, 2)
        optimizer = adamw(model.named_parameters(), betas=(0.9, 0.99), weight_decay=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        torch.autograd.backward(model(torch.tensor([[1.0, 2.0, 3.0]])).sum())
        optimizer.step()
        named = list(model.named_parameters())
        packed = pack_moments(optimizer, named)

        fresh = adamw(model.named_parameters(), betas=(0.9, 0.99), weight_decay=0.1)
        unpack_moments(fresh, named, {**model.state_dict(), **packed}, step=1)
        for _, parameter in named:  # one input alone: its squared gradients are of rank one
            expected = optimizer.state[parameter]["exp_avg_sq"]
            assert torch.allclose(fresh.state[parameter]["exp_avg_sq"], expected, rtol=1e-5)
        assert without_moments({**model.state_dict(), **packed}).keys() == model.state_dict().keys()

    def test_vectors_do_not_decay(self) -> None:
        model = nn.Linear(3, 2)
        decay = {
            id(p): group["weight_decay"]
            for group in adamw(model.named_parameters(), betas=(0.9, 0.99), weight_decay=0.1).param_groups
            for p in group["params"]
        }
        assert decay == {id(model.weight): 0.1, id(model.bias): 0.0}


class TestSchedule:
    def test_rises_then_falls_to_the_floor(self) -> None:
        rates = [learning_rate(step, peak=1.0, warmup=10, total=110, floor=0.1) for step in range(130)]
        assert rates[0] == pytest.approx(0.1)
        assert max(rates) == rates[9] == rates[10] == 1.0
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
        assert rates[-1] == pytest.approx(0.1)


class TestPiece:
    def test_ends_by_the_clock_and_saves_now_and_then(self) -> None:
        now = [0.0]
        piece = Piece(10.0, save_every_s=120.0, clock=lambda: now[0])
        assert not piece.due()
        now[0] = 130.0
        assert piece.due()
        assert not piece.due()
        assert not piece.over()
        now[0] = 600.0
        assert piece.over()

    def test_no_limit_never_ends(self) -> None:
        now = [0.0]
        piece = Piece(0.0, clock=lambda: now[0])
        now[0] = 1e9
        assert not piece.over()

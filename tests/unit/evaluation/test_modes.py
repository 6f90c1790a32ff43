"""Parity in every mode that this machine has; and that the table says so where a mode fails."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evaluation import modes
from evaluation.golden import LmGolden, read_goldens
from evaluation.modes import Mode, ModeRow, measure, report_modes
from evaluation.play import LmOutcome
from graphs.backends import Backends
from models.checkpoint_tensors import lm_shapes
from models.config import LMConfig
from models.lm import LanguageModel
from tests.published_reference import golden_run

DATA = Path(__file__).parents[2] / "data"
# vLLM has no kernel for the golden model's heads, which are 8 wide.
WIDE = LMConfig(
    dim=128,
    text_card=60,
    num_heads=2,
    num_layers=2,
    context=40,
    depformer_dim=12,
    depformer_dim_feedforward=48,
    depformer_num_heads=3,
    depformer_num_layers=1,
)


def golden_lm() -> LmGolden:
    return next(golden for golden in read_goldens(DATA) if isinstance(golden, LmGolden))


@pytest.mark.parametrize("mode", modes.modes(), ids=lambda mode: mode.name)
def test_every_mode_keeps_its_bound(mode: Mode) -> None:
    row = measure(golden_lm(), mode)
    if row.not_run:
        pytest.skip(row.not_run)
    assert row.met, report_modes([row])
    assert row.mode.bound == 0.0 or row.text_error > row.mode.bound / 20, "the bound says nothing"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> LmGolden:
    """A run of a model with heads of 64, by the reference that the golden run vouches for (see test_parity)."""

    folder, generator = tmp_path_factory.mktemp("wide"), torch.Generator().manual_seed(8)
    shapes = lm_shapes(LanguageModel(WIDE, device="meta"), 16)
    weights = {
        name: (torch.randn(shape, generator=generator) * (0.5 if "emb" in name else shape[-1] ** -0.5)).half()
        for name, shape in shapes.items()
    }
    run = golden_run(
        {name: tensor.float() for name, tensor in weights.items()},
        asdict(WIDE),
        torch.randint(2048, (7, 8), generator=generator),
        torch.randint(WIDE.text_card, (4,), generator=generator),
        torch.randint(2048, (45, 8), generator=generator),
    )
    save_file(weights, folder / "wide.safetensors")
    save_file(run, folder / "wide_golden.safetensors")
    (folder / "wide_config.json").write_text(json.dumps(asdict(WIDE)))
    (found,) = read_goldens(folder)
    assert isinstance(found, LmGolden)
    return found


@pytest.mark.parametrize("name", ["compiled fp32", "compiled bf16", "compiled bf16, vLLM's attention"])
def test_heads_that_vllm_has_kernels_for(wide: LmGolden, name: str) -> None:
    mode = next(mode for mode in modes.modes() if mode.name == name)
    if mode.missing():
        pytest.skip(mode.missing())
    row = measure(wide, mode)
    assert not row.not_run
    assert row.met, report_modes([row])


# ---- what fails is said ---------------------------------------------------------------------------------------------

TORCH = Mode("torch bf16", torch.bfloat16, Backends(step="torch"), 0.01)


def test_an_error_above_its_bound_is_missed() -> None:
    row = measure(golden_lm(), replace(TORCH, bound=1e-3))
    assert not row.met
    assert "MISSED" in report_modes([row])
    assert "1 of 1 modes missed" in report_modes([row])


def test_a_mode_that_calls_itself_exact_has_to_be() -> None:
    row = measure(golden_lm(), replace(TORCH, bound=0.0))
    assert row.steps != "100/100"
    assert not row.met


def test_other_bits_in_company_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = replace(TORCH, dtype=torch.float32, bound=0.0)
    play = modes.play_lm

    def off_by_a_bit(*args: object, neighbours: bool = True) -> LmOutcome:
        outcome = play(*args, neighbours=neighbours)  # type: ignore[arg-type] # as it was called
        if neighbours:
            outcome.text_logits[7, 3] += 1e-6
        return outcome

    monkeypatch.setattr(modes, "play_lm", off_by_a_bit)
    row = measure(golden_lm(), exact)
    assert row.steps == "100/100"
    assert row.same_in_pages
    assert not row.same_in_company
    assert not row.met
    assert "OTHER BITS" in report_modes([row])


def test_a_machine_with_torch_alone_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "HAS_NUMBA", False)
    monkeypatch.setitem(sys.modules, "graphs.products", None)  # it cannot be imported there
    lacking = {mode.name: mode.missing() for mode in modes.modes()}
    assert lacking["compiled bf16, oneDNN bf16"] == "the package numba is not installed"
    assert lacking["torch fp32"] == ""


def test_what_cannot_run_says_why_and_is_no_failure() -> None:
    row = measure(golden_lm(), replace(TORCH, needs="no_such_package"))
    assert row.not_run == "the package no_such_package is not installed"
    assert row.met
    assert "not run: the package no_such_package" in report_modes([row, ModeRow(TORCH, not_run="why")])

"""int8 rows: how far off they may be, what a loader makes of them, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import CheckpointError, load_checkpoint
from models.checkpoint_int8 import ROW_SCALE, compact, quantise_rows, scale_problems, widen_rows
from tests.small_checkpoint import lm_tensors, write_small_checkpoint

LM_ONLY = frozenset({"lm"})


def test_every_entry_is_off_by_at_most_half_its_rows_step() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 64).unsqueeze(1)
    stored, scale = quantise_rows(weight)
    assert stored.dtype == torch.int8
    assert torch.equal(scale, weight.abs().amax(1) / 127)
    # Half a step, and what fp32 rounds at 127 times that.
    bound = 0.5 * scale * (1 + 127 * 2 * torch.finfo(torch.float32).eps)
    error = (widen_rows(stored, scale) - weight).abs()
    assert bool((error <= bound.unsqueeze(1)).all())
    assert bool((error.amax(1) > 0.4 * scale).all())  # the bound is met, not far above what happens


def test_steps_of_a_row_are_exact() -> None:
    steps = torch.tensor([[-127, 0, 5, 126], [127, -1, 64, 2]])
    weight = steps * torch.tensor([[0.5], [0.25]])
    stored, scale = quantise_rows(weight)
    assert torch.equal(stored.long(), steps)
    assert torch.equal(widen_rows(stored, scale), weight)


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scale = quantise_rows(torch.zeros(2, 3))
    assert torch.equal(widen_rows(stored, scale), torch.zeros(2, 3))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_diverged_weight_is_refused(odd: float) -> None:
    with pytest.raises(ValueError, match="diverged"):
        quantise_rows(torch.tensor([[1.0, odd]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [8, 16])  # with the depth transformer's user half, of which only a slice is read
def test_a_compact_model_loads_as_what_it_is_worth(tmp_path: Path, dtype: torch.dtype, steps: int) -> None:
    tensors = {name: tensor.float() for name, tensor in lm_tensors(steps).items()}
    shipped = compact(tensors)
    loaded = load_checkpoint(write_small_checkpoint(tmp_path, lm=shipped), parts=LM_ONLY, dtype=dtype)
    assert loaded.lm is not None
    for name, tensor in loaded.lm.state_dict().items():
        whole = tensors[name]
        rows = tensor.shape[0]
        if whole.dim() == 2:
            scale = shipped[f"{name}{ROW_SCALE}"]
            assert shipped[name].dtype == torch.int8
            assert torch.equal(tensor, widen_rows(shipped[name], scale)[:rows].to(dtype)), name
            bound = 0.5 * scale[:rows] * (1 + 1e-4)
            rounding = whole[:rows].abs() * (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0)
            assert bool(((tensor.float() - whole[:rows]).abs() <= bound.unsqueeze(1) + rounding).all()), name
        else:
            assert torch.equal(tensor, whole.half().float()), name


def test_a_compact_model_is_a_quarter_of_fp32() -> None:
    tensors = {"a.weight": torch.randn(2049, 320), "norm.alpha": torch.ones(1, 1, 320)}

    def size(held: dict[str, Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    assert size(compact(tensors)) == 2049 * 320 + 4 * 2049 + 2 * 320


def test_another_scale_is_another_model(tmp_path: Path) -> None:
    shipped = compact(lm_tensors())
    first = load_checkpoint(write_small_checkpoint(tmp_path, lm=shipped), parts=LM_ONLY).weights_hash
    shipped[f"text_linear.weight{ROW_SCALE}"] = shipped[f"text_linear.weight{ROW_SCALE}"] * 2
    assert load_checkpoint(write_small_checkpoint(tmp_path, lm=shipped), parts=LM_ONLY).weights_hash != first


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    shipped = compact(lm_tensors())
    shipped[f"text_emb.weight{ROW_SCALE}"] = torch.ones(3)
    shipped[f"out_norm.alpha{ROW_SCALE}"] = torch.ones(1)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(write_small_checkpoint(tmp_path, lm=shipped), parts=LM_ONLY)
    assert "out_norm.alpha.row_scale belongs to no int8 tensor" in str(raised.value)
    assert "text_emb.weight.row_scale is F32 [3], expected F32 [2001]" in str(raised.value)


def test_a_file_without_int8_has_no_problems() -> None:
    assert scale_problems({"a": ("BF16", (2, 3)), "b": ("F32", (4,))}) == []


def test_a_lone_int8_tensor_is_named(tmp_path: Path) -> None:
    shipped = compact(lm_tensors())
    del shipped[f"emb.0.weight{ROW_SCALE}"]
    save_file(shipped, (write_small_checkpoint(tmp_path)) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"emb\.0\.weight is I8 without emb\.0\.weight\.row_scale"):
        load_checkpoint(tmp_path, parts=LM_ONLY)

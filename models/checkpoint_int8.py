"""Weights stored as int8 with a scale per row: a quarter of fp32's file, widened to the serving dtype when loaded.

A matrix `name` is then stored as I8 beside `name.row_scale`, F32 [rows]: entry [r, …] is worth int8 · row_scale[r].
Serving computes in fp32 or bf16 whatever is stored; the compiled step can read such weights (graphs.compiled.pack).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROW_SCALE = ".row_scale"
_LARGEST = 127  # -128 is left unused: a row and its negative are stored alike


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [rows, …] → int8 [rows, …] and scales [rows] fp32; off by at most half a scale at every entry.

    A row's scale is its largest magnitude / 127. Raises ValueError for a weight that is not finite.
    """
    rows = weight.detach().float().flatten(1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("a weight that is infinite or not a number has no scale: the training has diverged")
    scale = rows.abs().amax(1) / _LARGEST
    steps = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    return (rows / steps).round().clamp(-_LARGEST, _LARGEST).to(torch.int8).view(weight.shape), scale


def widen_rows(stored: Tensor, scale: Tensor) -> Tensor:
    """int8 [rows, …] and its scales → fp32. Of more scales than rows the first count."""
    return stored.float() * scale[: stored.shape[0]].view(-1, *([1] * (stored.dim() - 1)))


def compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as it ships: matrices as int8 with scales, everything else (norms) as fp16."""
    shipped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            shipped[name], shipped[f"{name}{ROW_SCALE}"] = quantise_rows(tensor)
        else:
            shipped[name] = tensor.to(torch.float16).contiguous()
    return shipped


def scale_problems(kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """What is wrong with the int8 tensors of a file; kinds: name → (dtype, shape) as its header has them."""
    problems = []
    for name, (dtype, shape) in kinds.items():
        if name.endswith(ROW_SCALE):
            owner = kinds.get(name.removesuffix(ROW_SCALE))
            if owner is None or owner[0] != "I8":
                problems.append(f"{name} belongs to no int8 tensor")
            elif dtype != "F32" or shape != owner[1][:1]:
                problems.append(f"{name} is {dtype} {list(shape)}, expected F32 {list(owner[1][:1])}")
        elif dtype == "I8" and f"{name}{ROW_SCALE}" not in kinds:
            problems.append(f"{name} is I8 without {name}{ROW_SCALE}")
    return sorted(problems)

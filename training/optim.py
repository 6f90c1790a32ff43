"""AdamW with a schedule, and a resume state small enough to travel: second moments kept as row and column means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_MOMENTS = "moments."


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.05) -> float:
    """Linear warm-up, then a cosine down to `floor` of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(module: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over a module's parameters; matrices decay, vectors (norms, biases, scales) do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2 and p.shape[0] > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2 or p.shape[0] == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8)


def pack_moments(optimizer: torch.optim.AdamW, names: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The second moments as Adafactor keeps them (Shazeer & Stern 2018): a mean per row and per column.

    First moments are left out: they are an average over ten steps, and come back in as many.
    """
    packed: dict[str, Tensor] = {}
    for name, parameter in names:
        state = optimizer.state.get(parameter)
        if not state:
            continue
        square = state["exp_avg_sq"].float()
        if square.dim() < 2:
            packed[f"{_MOMENTS}{name}"] = square
            continue
        table = square.flatten(1)
        packed[f"{_MOMENTS}{name}.rows"] = table.mean(1)
        packed[f"{_MOMENTS}{name}.columns"] = table.mean(0)
    return packed


def unpack_moments(
    optimizer: torch.optim.AdamW, names: Iterable[tuple[str, nn.Parameter]], packed: Mapping[str, Tensor], step: int
) -> None:
    """Gives a fresh optimizer the moments of `pack_moments` after `step` steps; parameters without any start anew."""
    for name, parameter in names:
        if f"{_MOMENTS}{name}" in packed:
            square = packed[f"{_MOMENTS}{name}"]
        elif f"{_MOMENTS}{name}.rows" in packed:
            rows, columns = packed[f"{_MOMENTS}{name}.rows"], packed[f"{_MOMENTS}{name}.columns"]
            square = (rows[:, None] * columns[None] / rows.mean().clamp(min=1e-30)).view(parameter.shape)
        else:
            continue
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": square.to(parameter),
        }


def without_moments(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a saved state alone."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_MOMENTS)}

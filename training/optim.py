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


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    fine: tuple[str, float] = ("", 1.0),
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """AdamW over named parameters; matrices decay, vectors (norms, biases, scales) do not.

    fine: a prefix of names and what their rate is multiplied by. AdamW moves every weight by about the rate,
    whatever its size: right for weights near 0.1, a tenth of themselves a step for a layer whose are near 0.005.
    """
    prefix, factor = fine
    named = [(name, p) for name, p in parameters if p.requires_grad]
    coarse = [p for name, p in named if not (prefix and name.startswith(prefix))]
    groups = [
        {"params": [p for p in coarse if p.dim() >= 2 and p.shape[0] > 1], "weight_decay": weight_decay},
        {"params": [p for p in coarse if p.dim() < 2 or p.shape[0] == 1], "weight_decay": 0.0},
    ]
    if prefix:
        small = [p for name, p in named if name.startswith(prefix)]
        groups.append({"params": small, "weight_decay": 0.0, "factor": factor})
    return torch.optim.AdamW([{"factor": 1.0, **group} for group in groups], lr=0.0, betas=betas, eps=1e-8, fused=fused)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Gives every group its share of a rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def clip(optimizer: torch.optim.AdamW, limit: float) -> float:
    """Scales gradients down to a norm of `limit`; returns the norm before.

    Each parameter counts as if it were of the usual size: a layer of small weights has gradients as much larger,
    and would decide alone how far all the others go.
    """
    scaled = [
        p.grad.norm() * group["factor"]
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    norm = torch.stack(scaled).norm()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(share)
    return float(norm)


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

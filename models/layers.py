"""The few layers both transformers of the language model are made of. Rows in, rows out: every op is per row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-8  # as published; far below the usual 1e-5, so it may not be "tidied"


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + 1e-8) · alpha, computed in fp32 whatever the model's dtype (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, dim, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] → the same shape and dtype."""
        alpha = self.alpha.view(-1)
        return F.rms_norm(x.float(), alpha.shape, alpha, RMS_EPS).to(x.dtype)


class Linear(nn.Module):
    """A bias-free linear layer, without nn.Linear's random initialisation: weights come from a checkpoint."""

    def __init__(
        self, inputs: int, outputs: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """A token table; looked up through LanguageModel.embed, which knows what token -1 means."""

    def __init__(
        self, entries: int, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(entries, dim, device=device, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Gating(nn.Module):
    """silu(gate) · value feed-forward; `linear_in` packs [gate, value] (Shazeer 2020)."""

    def __init__(
        self, dim: int, hidden: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.linear_in = Linear(dim, 2 * hidden, device, dtype)
        self.linear_out = Linear(hidden, dim, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, dim] → [rows, dim]."""
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        out: Tensor = self.linear_out(F.silu(gate) * value)
        return out


class AttentionWeights(nn.Module):
    """The two projections of an attention layer. For the depth transformer they are stacked per codebook."""

    def __init__(
        self, dim: int, stacks: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(stacks * 3 * dim, dim, device=device, dtype=dtype))
        self.out_proj = Linear(dim, stacks * dim, device, dtype)


def rope_rotation(positions: Tensor, head_dim: int, max_period: float) -> Tensor:
    """Unit complex numbers [rows, 1, head_dim / 2] for integer positions [rows] (Su et al. 2021)."""
    steps = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(steps * (-2.0 * math.log(max_period) / head_dim))
    angle = positions.float().unsqueeze(-1) * frequency
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x [rows, ..., head_dim]; arithmetic in fp32, result in x's dtype.

    rotation: [rows, 1 for each dimension between, head_dim / 2] complex.
    """
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)

"""The few layers both transformers of the language model are made of. Rows in, rows out: every op is per row."""

from __future__ import annotations

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
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)
        return (wide * scale * self.alpha.view(-1)).to(x.dtype)


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


def rope_tables(positions: Tensor, head_dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    """cos and sin [rows, 1, head_dim / 2] fp32 for integer positions [rows] (Su et al. 2021, interleaved pairs)."""
    steps = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(steps * (-2.0 * torch.log(torch.tensor(max_period)).item() / head_dim))
    angle = positions.float().unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x [rows, heads, head_dim]; arithmetic in fp32, result in x's dtype."""
    rows, heads, dim = x.shape
    pairs = x.float().view(rows, heads, dim // 2, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.view(rows, heads, dim).to(x.dtype)

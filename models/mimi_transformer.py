"""The codec's transformers: causal, two positions a frame, keys and values in one ring per slot and layer."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import CodecTransformerConfig
from models.slot_state import SlotState

POSITIONS_PER_FRAME = 2  # 25 Hz below the codec's 12.5 Hz frames


def visibility(query: Tensor, key: Tensor, context: int) -> Tensor:
    """Additive attention bias [..., queries, keys] fp32 from positions [..., queries] and [..., keys] int64.

    The published ring drops its oldest entry while it writes a frame, so both positions of a frame look back
    to `context - 1` positions before the frame's end: the first sees one key fewer than the second. Keys at
    negative positions do not exist yet.
    """
    frame_end = (query // POSITIONS_PER_FRAME + 1) * POSITIONS_PER_FRAME
    query, frame_end, key = query.unsqueeze(-1), frame_end.unsqueeze(-1), key.unsqueeze(-2)
    visible = (key <= query) & (key >= frame_end - (context - 1)) & (key >= 0)
    return torch.where(visible, 0.0, -math.inf)


def rotation(positions: Tensor, head_dim: int, max_period: float) -> Tensor:
    """RoPE as unit complex numbers [..., 1, head_dim / 2] for positions [...] int64; fp32 throughout."""
    pairs = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None, None] * torch.exp(pairs * (-2.0 * math.log(max_period) / head_dim))
    return torch.complex(angles.cos(), angles.sin())


def rotate_(x: Tensor, by: Tensor) -> None:
    """Turns the interleaved pairs (2i, 2i+1) of x [..., heads, head_dim] by [..., 1, head_dim / 2], in place."""
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(by)


class SelfAttention(nn.Module):
    """Parameters `in_proj_weight` [3 * dim, dim] (all q, all k, all v) and `out_proj.weight` [dim, dim]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * dim, dim)))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, time, dim] → queries [batch, time, heads, head_dim] and keys with values
        [batch, heads, 2, time, head_dim]."""
        qkv = F.linear(x, self.in_proj_weight).view(*x.shape[:-1], 3, self.heads, self.head_dim)
        rotate_(qkv[:, :, :2], turn.unsqueeze(-3))
        return qkv[:, :, 0], qkv[:, :, 1:].permute(0, 3, 2, 1, 4)

    def attend(self, queries: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
        """[batch, time, heads, head_dim], [batch, heads, 2, keys, head_dim] and the additive bias
        [batch or 1, 1, time, keys] → [batch, time, dim]."""
        keys, values = seen.unbind(2)
        y = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=bias)
        return F.linear(y.transpose(1, 2).flatten(-2), self.out_proj.weight)


class LayerScale(nn.Module):
    """A learnt factor per channel; parameter `scale` [dim]."""

    def __init__(self, dim: int, initial: float = 0.01) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), initial))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each branch scaled."""

    def __init__(self, config: CodecTransformerConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.linear1 = nn.Linear(dim, config.dim_feedforward, bias=False)
        self.linear2 = nn.Linear(config.dim_feedforward, dim, bias=False)
        self.layer_scale_1 = LayerScale(dim)
        self.layer_scale_2 = LayerScale(dim)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = F.gelu(F.linear(self.norm2(x), self.linear1.weight))
        return torch.addcmul(x, F.linear(h, self.linear2.weight), self.layer_scale_2.scale)


class MimiTransformer(nn.Module):
    """Parameters below `transformer.layers.<n>`; no final norm.

    Streamed state: `<state_name>.<n>` [slots, heads, 2, context, head_dim] fp32, keys and values by position
    modulo context. An inactive slot's ring is written too, but only in the two entries that its window has
    left and that its next frame overwrites before it looks; so nothing there needs a mask.
    """

    def __init__(self, config: CodecTransformerConfig) -> None:
        super().__init__()
        if config.context <= POSITIONS_PER_FRAME:
            raise ValueError(f"the codec's context must exceed {POSITIONS_PER_FRAME} positions, got {config.context}")
        self.config = config
        self.state_name = ""
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_layers))})

    @property
    def layers(self) -> list[Layer]:
        return cast(list[Layer], self.transformer["layers"])

    @property
    def head_dim(self) -> int:
        return self.config.d_model // self.config.num_heads

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.config.num_heads, 2, self.config.context, self.head_dim)
        return {f"{self.state_name}.{index}": shape for index in range(self.config.num_layers)}

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, dim] → the same, a whole sequence from its start; differentiable."""
        positions = torch.arange(x.shape[1], device=x.device)
        bias = visibility(positions, positions, self.config.context)[None, None]
        turn = rotation(positions, self.head_dim, self.config.max_period)
        for layer in self.layers:
            y = layer.self_attn.attend(*layer.self_attn.project(layer.norm1(x), turn), bias)
            x = layer.feed_forward(torch.addcmul(x, y, layer.layer_scale_1.scale))
        return x

    def step(self, x: Tensor, state: SlotState, frames: Tensor) -> Tensor:
        """[slots, time, dim] → the same; `frames` [slots] int64 counts the frames before this call.

        One frame a call is the live path. More frames a call are for rows that are all active.
        """
        slots, time, _ = x.shape
        context, one_frame = self.config.context, time == POSITIONS_PER_FRAME
        start = (frames * POSITIONS_PER_FRAME).unsqueeze(1)
        positions = start + torch.arange(time, device=x.device)
        # One frame is written first and then seen in the ring. A longer chunk would overwrite what its first
        # frames still see, so it looks at the old ring and at itself.
        newest = start + (time - 1) if one_frame else start - 1
        held = newest - torch.remainder(newest - torch.arange(context, device=x.device), context)
        seen = held if one_frame else torch.cat([held, positions], dim=1)
        bias = visibility(positions, seen, context).unsqueeze(1)
        turn = rotation(positions, self.head_dim, self.config.max_period)
        rows = torch.arange(slots, device=x.device).unsqueeze(1)
        entries = torch.remainder(positions[:, -context:], context)
        for index, layer in enumerate(self.layers):
            queries, newest_kv = layer.self_attn.project(layer.norm1(x), turn)
            ring = state[f"{self.state_name}.{index}"]
            seen_kv = ring if one_frame else torch.cat([ring, newest_kv], dim=3)
            ring[rows, :, :, entries] = newest_kv[:, :, :, -context:].permute(0, 3, 1, 2, 4)
            y = layer.self_attn.attend(queries, seen_kv, bias)
            x = layer.feed_forward(torch.addcmul(x, y, layer.layer_scale_1.scale))
        return x

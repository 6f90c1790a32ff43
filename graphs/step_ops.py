"""The operations of the step of fixed shape, and their plain meaning in torch operators.

`TorchOps` is the reference that the kernels are tested against, and runs the same step where there is no GPU.
Everything reads the tables of graphs.step_inputs; nothing returns to the host.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.ring_cache import RingCache, fp8_scale
from graphs.sampling import gumbel_noise
from graphs.spans import KEY_BLOCK
from graphs.step_inputs import AUDIO, GIVEN, GIVEN_EMBEDDING, KEY, POSITION, SLOT, TEXT
from models.config import STREAMS
from models.layers import RMS_EPS

Turn = tuple[Tensor, Tensor]  # cosine and sine [rows, head_dim / 2] fp32


class StepOps(Protocol):
    """What graphs.cuda_step is written in. All shapes are fixed; sums of a row do not depend on other rows."""

    def embed(self, rows: Tensor, table: Tensor, starts: Tensor, given: Tensor) -> Tensor:
        """rows [n, 20] → the sum of their tokens' entries, [n, dim]; `given` [n, dim] where a row says so."""
        ...

    def norm_of(self, x: Tensor, alpha: Tensor, index: Tensor) -> Tensor:
        """The RMS norm of x's rows index [n] → [n, dim]."""
        ...

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [n, inputs] → [n, outputs]: RMS norm by alpha before, silu(gate) · value or a residual after."""
        ...

    def attend(self, layer: int, packed: Tensor, rows: Tensor, blocks: Tensor, turn: Turn) -> Tensor:
        """packed q, k, v [n, 3 · dim] → rotated, written into the cache, attended: [n, dim]."""
        ...

    def store(self, layer: int, packed: Tensor, rows: Tensor, turn: Turn) -> Tensor:
        """The first half of `attend`: writes the rows' keys and values; returns their rotated queries [n, dim]."""
        ...

    def depth_attend(self, packed: Tensor, codebook: int, heads: int) -> Tensor:
        """packed [8, n, 3 · dim], filled up to `codebook` → [n, dim]."""
        ...

    def draw(
        self, logits: Tensor, asked: Tensor, stream: int, tokens: Tensor, following: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Draws tokens[:, stream] [n, 9] from logits [n, card] fp32; returns following[0] + the token's entry in
        following[1], where the next depth step starts."""
        ...


class TorchOps:
    """Each operation as torch has it, over the whole ring of every row: right, and slow."""

    def __init__(self, cache: RingCache, heads: int) -> None:
        self._cache, self._heads = cache, heads

    def embed(self, rows: Tensor, table: Tensor, starts: Tensor, given: Tensor) -> Tensor:
        tokens = rows[:, :STREAMS].long()
        x = F.embedding_bag(torch.where(tokens >= 0, tokens + starts, 0), table, mode="sum")
        return torch.where(rows[:, GIVEN_EMBEDDING, None] > 0, given, x)

    def norm_of(self, x: Tensor, alpha: Tensor, index: Tensor) -> Tensor:
        return _norm(x[index.long()], alpha)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        return torch_linear(x, weight, alpha=alpha, residual=residual, gated=gated, out=out)

    def attend(self, layer: int, packed: Tensor, rows: Tensor, blocks: Tensor, turn: Turn) -> Tensor:
        cache, count = self._cache, len(packed)
        slots, position = rows[:, SLOT].long(), rows[:, POSITION].long()
        q = self.store(layer, packed, rows, turn).view(count, self._heads, -1)
        keys, values = self._rings(layer, slots)
        index = torch.arange(cache.capacity, device=packed.device)
        behind = (position[:, None] - index) % cache.capacity
        seen = (behind < (position + 1).clamp(max=cache.window)[:, None])[:, None]
        scores = (q.float().unsqueeze(2) @ keys.mT).squeeze(2) * q.shape[-1] ** -0.5
        shares = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        shares = torch.where(position[:, None, None] >= 0, shares, 0.0)  # padding sees nothing, which is NaN
        return (shares.unsqueeze(2) @ values).reshape(count, -1).to(packed.dtype)

    def store(self, layer: int, packed: Tensor, rows: Tensor, turn: Turn) -> Tensor:
        """The first half of `attend`: writes keys and values, returns the rotated queries [n, dim]."""
        slots, position = rows[:, SLOT].long(), rows[:, POSITION].long()
        q, k, v = packed.view(len(packed), 3, self._heads, -1).unbind(1)
        self._store(layer, position >= 0, slots, position % self._cache.capacity, rotate(k, turn), v)
        return rotate(q, turn).flatten(1)

    def _store(self, layer: int, live: Tensor, slots: Tensor, ring: Tensor, k: Tensor, v: Tensor) -> None:
        stretches, places = slots[live], ring[live]
        if self._cache.page_table is not None:
            stretches = self._cache.page_table[stretches, places // KEY_BLOCK].long()
            places = places % KEY_BLOCK
        where = (stretches, slice(None), places)
        for half, (cached, fresh) in enumerate(((self._cache.keys, k[live]), (self._cache.values, v[live]))):
            if self._cache.scales is None:
                cached[layer][where] = fresh
            else:
                scale = fp8_scale(fresh)
                self._cache.scales[half, layer][where] = scale.bfloat16()
                stored = (fresh.float() / scale.unsqueeze(-1)).to(cached.dtype)
                cached[layer].view(torch.uint8)[where] = stored.view(torch.uint8)  # torch indexes no fp8 on a CPU

    def _rings(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, capacity, head_dim] fp32 of each row's slot."""
        rings = []
        for half, cached in enumerate((self._cache.keys, self._cache.values)):
            ring = cached[layer].float()
            if self._cache.scales is not None:
                ring *= self._cache.scales[half, layer].float().unsqueeze(-1)
            if self._cache.page_table is None:
                rings.append(ring[slots])
            else:  # what has no page yet is seen by nobody
                pages = self._cache.page_table[slots].long().clamp(min=0)
                rings.append(ring[pages].transpose(1, 2).flatten(2, 3))
        return rings[0], rings[1]

    def depth_attend(self, packed: Tensor, codebook: int, heads: int) -> Tensor:
        rows = packed.shape[1]
        parts = packed[: codebook + 1].view(codebook + 1, rows, 3, heads, -1)
        q = parts[codebook, :, 0].unsqueeze(2)
        k, v = parts[:, :, 1].permute(1, 2, 0, 3), parts[:, :, 2].permute(1, 2, 0, 3)
        return F.scaled_dot_product_attention(q, k, v).reshape(rows, -1)

    def draw(
        self, logits: Tensor, asked: Tensor, stream: int, tokens: Tensor, following: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        column = TEXT if stream == 0 else AUDIO
        temperature = asked[:, column].contiguous().view(torch.float32).unsqueeze(1)
        card = logits.shape[1]
        ranked = logits.sort(dim=-1, descending=True).values
        threshold = ranked.gather(1, (asked[:, column + 1].long().clamp(max=card) - 1).unsqueeze(1))
        words = asked[:, KEY : KEY + 2].long() & 0xFFFFFFFF
        noise = gumbel_noise(words[:, 0] | words[:, 1] << 32, stream, card)
        drawing = temperature > 0
        scaled = (logits / torch.where(drawing, temperature, 1.0) + noise).masked_fill(
            logits < threshold, float("-inf")
        )
        drawn = torch.where(drawing, scaled, logits).argmax(dim=-1)
        given = asked[:, GIVEN + stream].long()
        token = torch.where(given >= 0, given, drawn)
        tokens[:, stream] = token
        return logits[:, :0] if following is None else following[0] + following[1][token]


def torch_linear(
    x: Tensor,
    weight: Tensor,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """StepOps.linear in torch operators."""
    y = F.linear(x if alpha is None else _norm(x, alpha), weight)
    if gated:
        gate, value = y.chunk(2, dim=-1)
        y = F.silu(gate) * value
    if residual is not None:
        y = residual + y
    return y if out is None else out.copy_(y)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotates the pairs (2i, 2i+1) of x [rows, heads, head_dim]; arithmetic in fp32, result in x's dtype."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosine, sine = turn[0].unsqueeze(1), turn[1].unsqueeze(1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2).to(x.dtype)


def _norm(x: Tensor, alpha: Tensor) -> Tensor:
    return F.rms_norm(x.float(), alpha.shape, alpha, RMS_EPS).to(x.dtype)

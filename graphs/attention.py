"""Attention of rows over their slots' rings, reduced in an order that depends on nothing but the row itself.

The order is what makes a cache rebuilt from a journal, in chunks, equal bit for bit to the one that was filled
frame by frame: keys stand at position % capacity, products over them are summed in whole blocks of one size, and a
row is computed the same whether one, four or sixty-four rows are. Measured on CPU in fp32: a matrix product gives a
row the same bits for any number of rows from four on, but others for one to three (hence ROW_PAD), and how it splits
its own sum depends on that sum's length, from 193 terms on (hence blocks of KEY_BLOCK keys, never a part of one).
`tests/unit/graphs/test_attention.py` checks it on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.kv_cache import KEY_BLOCK, KVCache, Span, round_up
from models.config import LMConfig

ROW_PAD = 4


@dataclass(frozen=True)
class _Job:
    """One span's share of the attention: which rows, which keys, and what each row may see."""

    rows: slice
    slot: int
    keys: int
    pages: Tensor | None  # [keys / KEY_BLOCK] int64, where the cache has a pool
    mask: Tensor  # [padded rows, keys] fp32, 0 or -inf


class RowCache(KVCache):
    """Rings of [capacity, head_dim]: a key is a row."""

    def __init__(
        self,
        config: LMConfig,
        slots: int,
        tile: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        pages: int | None = None,
    ) -> None:
        super().__init__(config, slots, tile, pages)
        stretches, positions = self.places
        shape = (config.num_layers, stretches, config.num_heads, positions, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def attention(self, spans: Sequence[Span]) -> SpanAttention:
        return SpanAttention(self, spans)


class SpanAttention:
    """The portable backend: torch operators, one small batch of products per span, over the keys that exist.

    Serves any device. On CUDA it launches many kernels and is not captured; see docs/decisions/rows.md.
    """

    def __init__(self, cache: RowCache, spans: Sequence[Span]) -> None:
        device = cache.keys.device
        self._cache = cache
        self._scale = float(cache.keys.shape[-1]) ** -0.5
        slots = [span.slot for span in spans for _ in range(span.count)]
        ring = [(span.first + i) % cache.capacity for span in spans for i in range(span.count)]
        if cache.pool is not None:  # a row writes into its position's page
            table = cache.pool.table
            slots = [int(table[slot, place // KEY_BLOCK]) for slot, place in zip(slots, ring, strict=True)]
            ring = [place % KEY_BLOCK for place in ring]
        self._stretches = torch.tensor(slots, device=device)
        self._places = torch.tensor(ring, device=device)
        self._rows = len(slots)
        self._jobs = [self._job(span) for span in spans]

    def _job(self, span: Span) -> _Job:
        cache, device = self._cache, self._cache.keys.device
        wrapped = span.last >= cache.capacity
        keys = cache.capacity if wrapped else round_up(span.last + 1, KEY_BLOCK)
        index = torch.arange(keys, device=device)
        held = span.last - (span.last - index) % cache.capacity  # the position whose key stands at each index
        rows = torch.arange(span.first, span.first + round_up(span.count, ROW_PAD), device=device).unsqueeze(1)
        seen = (held >= 0) & (held <= rows) & (held > rows - cache.window)
        mask = torch.zeros(seen.shape, device=device).masked_fill_(~seen, float("-inf"))
        # Padding rows repeat the last real one: a row that sees nothing would be NaN.
        mask[span.count :] = mask[span.count - 1]
        pages = None
        if cache.pool is not None:
            pages = torch.from_numpy(cache.pool.of(span.slot, keys // KEY_BLOCK)).to(device)
        return _Job(slice(span.start, span.start + span.count), span.slot, keys, pages, mask)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [rows, heads, head_dim] → [rows, heads, head_dim]; rows beyond the spans' come back as zeros."""
        cache, rows = self._cache, self._rows
        cache.keys[layer][self._stretches, :, self._places] = k[:rows].to(cache.keys.dtype)
        cache.values[layer][self._stretches, :, self._places] = v[:rows].to(cache.values.dtype)
        out = torch.zeros_like(q)
        for job in self._jobs:
            keys, values = (_seen(ring, job) for ring in (cache.keys[layer], cache.values[layer]))
            out[job.rows] = self._attend(q[job.rows], keys, values, job.mask)
        return out

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """q [n, heads, d]; keys, values [heads, L, d]; mask [padded n, L] → [n, heads, d]."""
        count = q.shape[0]
        padding = mask.shape[0] - count
        if padding:
            q = torch.cat((q, q[-1:].expand(padding, -1, -1)))
        heads_first = q.transpose(0, 1).to(keys.dtype)
        scores = torch.matmul(heads_first, keys.transpose(1, 2)).float() * self._scale + mask
        weights = torch.softmax(scores, dim=-1).to(values.dtype)
        mixed = torch.matmul(weights[..., :KEY_BLOCK], values[:, :KEY_BLOCK])
        for start in range(KEY_BLOCK, keys.shape[1], KEY_BLOCK):
            stop = start + KEY_BLOCK
            mixed = mixed + torch.matmul(weights[..., start:stop], values[:, start:stop])
        return mixed.transpose(0, 1)[:count].to(q.dtype)


def _seen(layer: Tensor, job: _Job) -> Tensor:
    """The first `job.keys` places of a job's ring, [heads, keys, head_dim]; out of pages, a copy."""
    if job.pages is None:
        return layer[job.slot, :, : job.keys]
    return layer[job.pages].transpose(0, 1).flatten(1, 2)

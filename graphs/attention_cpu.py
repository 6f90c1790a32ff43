"""Keys and values as the CPU's compiled attention reads them, and one step's attention over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphs.compiled import as_array
from graphs.compiled_attention import attend, store
from graphs.kv_cache import KEY_BLOCK, KVCache, Span, round_up
from models.config import LMConfig

HEAD_PAD = 32  # a head's dimensions are filled up to so many: what one load holds in bf16


class CompiledCache(KVCache):
    """Rings of [capacity, head_dim filled up to 32s] in bf16 or fp32, which `store` and `attend` alone read.

    block_starts, head_hop: where a ring's blocks are, see attend; with a pool the blocks are its pages, and those that
    a ring has none of say -1. Raises ValueError for other dtypes.
    """

    def __init__(
        self, config: LMConfig, slots: int, tile: int, *, dtype: torch.dtype, pages: int | None = None
    ) -> None:
        super().__init__(config, slots, tile, pages)
        self.head_dim = config.head_dim
        dims = round_up(config.head_dim, HEAD_PAD)
        stretches, positions = self.places
        shape = (config.num_layers, stretches, config.num_heads, positions, dims)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.key_arrays, self.value_arrays = as_array(self.keys), as_array(self.values)
        self.head_hop = positions * dims
        ring = np.arange(slots)[:, None] * config.num_heads * self.head_hop
        self.block_starts = ring + np.arange(self.blocks) * KEY_BLOCK * dims

    def cover(self, spans: Sequence[Span]) -> None:
        """See KVCache.cover."""
        super().cover(spans)
        if self.pool is not None and self.pool.changed:
            pages = self.pool.table.astype(np.int64)
            self.block_starts = np.where(pages >= 0, pages * (self.keys.shape[2] * self.head_hop), -1)
            self.pool.changed = False

    def attention(self, spans: Sequence[Span]) -> CompiledAttention:
        return CompiledAttention(self, spans)


class CompiledAttention:
    """Which row writes where and sees what in one step; called, it does so (see KVCache.attention)."""

    def __init__(self, cache: CompiledCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self.scale = np.float32(cache.head_dim**-0.5)
        position = self.position = np.concatenate([np.arange(s.first, s.first + s.count) for s in spans])
        self.slots = np.concatenate([np.full(span.count, span.slot) for span in spans])
        self.places = position % cache.capacity
        self.count = np.minimum(position + 1, cache.window)
        self.first = position + 1 - self.count
        self.rows = len(position)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [rows, heads, head_dim] → [rows, heads, head_dim]; rows beyond the spans' come back as zeros."""
        cache, rows = self._cache, self.rows
        keys, values = cache.key_arrays[layer], cache.value_arrays[layer]
        store(keys, cache.block_starts, cache.head_hop, self.slots, self.places, k[:rows].float().numpy())
        store(values, cache.block_starts, cache.head_hop, self.slots, self.places, v[:rows].float().numpy())
        out = torch.zeros(q.shape, dtype=torch.float32)
        queries, ring = q[:rows].float().numpy(), (cache.block_starts, cache.head_hop)
        attend(queries, keys, values, *ring, self.slots, self.first, self.count, self.scale, out.numpy())
        return out.to(q.dtype)

"""Attention on the CPU, compiled by numba: each row by itself, over exactly the keys it sees, in 16 or 32 bits.

One row of one head is two passes over memory: scores over keys, then the mix of values. In both rings a key is a row,
so that what a step reads of a slot's head is one stretch of memory, read once. What a row computes depends on its
position alone, never on its neighbours or on how rows came in chunks (docs/decisions/cpu-attention.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from graphs.compiled import as_array, compiled, compiled_in_order, exp
from graphs.compiled_vectors import fetch, keep, mix_four_loads, mix_one_load, mix_two_loads, score_eight, score_one
from graphs.kv_cache import KEY_BLOCK, KVCache, Span, round_up
from models.config import LMConfig

HEAD_PAD = 32  # a head's dimensions are filled up to so many: what one load holds in bf16


def chunk(ring: Any) -> int:
    """Dimensions that one load of a ring holds (see graphs.compiled_vectors)."""
    raise NotImplementedError("only called from compiled code")


@overload(chunk)
def _chunk_typed(ring: Any) -> Any:
    def of_floats(ring: Any) -> Any:
        return 16

    def of_halves(ring: Any) -> Any:
        return 32

    return of_floats if isinstance(ring.dtype, types.Float) else of_halves


@compiled_in_order
def score(
    q: Any, keys: Any, at: int, hop: int, dims: int, scores: Any, place: int, count: int, then: Any, then_at: int
) -> None:
    """scores[place : place + count] = q [dims] · the keys at `at`, `at + hop`, … in memory.

    `then` at `then_at` is what is read next, as many rows: the memory is asked for it meanwhile.
    """
    line = chunk(keys)  # which is a line of the cache, too: 64 bytes
    chunks = dims // line
    whole = count - count % 8
    for j in range(0, whole, 8):
        for ahead in range(0, 8 * hop, line):
            fetch(then, then_at + j * hop + ahead)
        score_eight(q, 0, keys, at + j * hop, hop, chunks, scores, place + j)
    for j in range(whole, count):
        score_one(q, 0, keys, at + j * hop, hop, chunks, scores, place + j)


@compiled
def soften(scores: Any, count: int) -> Any:
    """Turns scores[:count] into unnormalised weights; returns their sum."""
    largest = scores[0]
    for j in range(count):
        largest = max(largest, scores[j])
    total = np.float32(0.0)
    for j in range(count):
        weight = exp(scores[j] - largest)
        scores[j] = weight
        total += weight
    return total


@compiled_in_order
def mix(
    scores: Any, place: int, values: Any, at: int, hop: int, dims: int, count: int, out: Any, then: Any, then_at: int
) -> None:
    """out [dims] += the values at `at`, `at + hop`, … weighted by scores[place : place + count]; `then` as in score."""
    step = chunk(values)
    for j in range(0, count, 16):
        for ahead in range(0, 16 * hop, step):
            fetch(then, then_at + j * hop + ahead)
        some, start = min(16, count - j), at + j * hop
        if step == 16 and dims % 64 == 0:
            for d in range(0, dims, 64):
                mix_four_loads(scores, place + j, values, start + d, hop, some, out, d)
        elif dims % (2 * step) == 0:
            for d in range(0, dims, 2 * step):
                mix_two_loads(scores, place + j, values, start + d, hop, some, out, d)
        else:
            for d in range(0, dims, step):
                mix_one_load(scores, place + j, values, start + d, hop, some, out, d)


@compiled_in_order
def store(ring: Any, blocks: Any, head_hop: int, slots: Any, places: Any, fresh: Any) -> None:
    """Puts fresh [rows, heads, head_dim] into place places[row] of the ring of slots[row]; see attend."""
    dims, step = ring.shape[3], chunk(ring)
    vector = np.zeros(dims, np.float32)
    for row in range(slots.shape[0]):
        block, within = places[row] // KEY_BLOCK, places[row] % KEY_BLOCK
        for head in range(fresh.shape[1]):
            at = blocks[slots[row], block] + head * head_hop + within * dims
            for d in range(fresh.shape[2]):
                vector[d] = fresh[row, head, d]
            for d in range(0, dims, step):
                keep(vector, d, ring, at + d)


@compiled_in_order
def attend(
    q: Any,
    keys: Any,
    values: Any,
    blocks: Any,
    head_hop: int,
    slots: Any,
    first: Any,
    count: Any,
    scale: Any,
    out: Any,
) -> None:
    """Row r of slot slots[r] sees the count[r] positions from first[r] on, which may wrap around the ring's end.

    q, out [rows, heads, head_dim]; keys, values: the memory of one layer, its last axis a key as `store` filled it.
    A ring is read block by block, KEY_BLOCK positions each: blocks [slots, blocks of a ring] says where, in elements,
    that of head 0 begins; every further head's is head_hop behind. So rings may lie in one piece or in pages, and the
    sums are the same.
    """
    dims, capacity = keys.shape[3], blocks.shape[1] * KEY_BLOCK
    head_dim = q.shape[2]
    scores = np.empty(capacity, np.float32)
    query, mixed = np.zeros(dims, np.float32), np.empty(dims, np.float32)
    for row in range(slots.shape[0]):
        ring, start, seen = blocks[slots[row]], first[row] % capacity, count[row]
        for head in range(q.shape[1]):
            for d in range(head_dim):
                query[d] = q[row, head, d] * scale
            place, done = start, 0
            while done < seen:
                run = min(KEY_BLOCK - place % KEY_BLOCK, seen - done)
                at = ring[place // KEY_BLOCK] + head * head_hop + place % KEY_BLOCK * dims
                score(query, keys, at, dims, dims, scores, done, run, values, at)
                place, done = (place + run) % capacity, done + run
            total = soften(scores, seen)
            for d in range(dims):
                mixed[d] = np.float32(0.0)
            place, done = start, 0
            while done < seen:
                run = min(KEY_BLOCK - place % KEY_BLOCK, seen - done)
                at = ring[place // KEY_BLOCK] + head * head_hop + place % KEY_BLOCK * dims
                mix(scores, done, values, at, dims, dims, run, mixed, keys, at + head_hop)
                place, done = (place + run) % capacity, done + run
            for d in range(head_dim):
                out[row, head, d] = mixed[d] / total


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

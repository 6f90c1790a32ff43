"""Attention on the CPU, compiled by numba: each row by itself, over exactly the keys it sees, in 16 or 32 bits.

One row of one head is two passes over memory: scores over keys, then the mix of values. Both rings are stored
[head_dim, capacity], so that the long, contiguous dimension is the one that is vectorised, and a step reads every
visible key and value once, which is all it costs: at 16 slots of the demo model with a full context 9 ms of the
frame's 80, where torch's matrix products took 26 (docs/decisions/cpu-attention.md). What a row computes depends on its
position alone, never on its neighbours or on how rows came in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.compiled import as_array, compiled, exp, narrow, widen
from graphs.kv_cache import KVCache, Span
from models.config import LMConfig


@compiled
def _score(scores: Any, q: Any, keys: Any, start: int, count: int, place: int) -> None:
    """scores[place : place + count] = q · keys[:, start : start + count]; eight dimensions a pass."""
    out = scores[place : place + count]
    out[:] = np.float32(0.0)
    for d in range(0, q.shape[0], 8):
        k0, k1 = keys[d, start : start + count], keys[d + 1, start : start + count]
        k2, k3 = keys[d + 2, start : start + count], keys[d + 3, start : start + count]
        k4, k5 = keys[d + 4, start : start + count], keys[d + 5, start : start + count]
        k6, k7 = keys[d + 6, start : start + count], keys[d + 7, start : start + count]
        q0, q1, q2, q3, q4, q5, q6, q7 = q[d], q[d + 1], q[d + 2], q[d + 3], q[d + 4], q[d + 5], q[d + 6], q[d + 7]
        for j in range(count):
            low = q0 * widen(k0[j]) + q1 * widen(k1[j]) + q2 * widen(k2[j]) + q3 * widen(k3[j])
            high = q4 * widen(k4[j]) + q5 * widen(k5[j]) + q6 * widen(k6[j]) + q7 * widen(k7[j])
            out[j] += low + high


@compiled
def _softmax(scores: Any, count: int) -> Any:
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


@compiled
def _mix(out: Any, scores: Any, values: Any, start: int, count: int, place: int) -> None:
    """out += values[:, start : start + count] · scores[place : place + count]; four dimensions a pass."""
    weights = scores[place : place + count]
    for d in range(0, out.shape[0], 4):
        v0, v1 = values[d, start : start + count], values[d + 1, start : start + count]
        v2, v3 = values[d + 2, start : start + count], values[d + 3, start : start + count]
        a0, a1, a2, a3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for j in range(count):
            weight = weights[j]
            a0 += weight * widen(v0[j])
            a1 += weight * widen(v1[j])
            a2 += weight * widen(v2[j])
            a3 += weight * widen(v3[j])
        out[d] += a0
        out[d + 1] += a1
        out[d + 2] += a2
        out[d + 3] += a3


@compiled
def store(ring: Any, slots: Any, places: Any, fresh: Any) -> None:
    """ring[slot, :, :, place] = fresh [rows, heads, head_dim], row by row."""
    for row in range(fresh.shape[0]):
        for head in range(fresh.shape[1]):
            target = ring[slots[row], head]
            for d in range(fresh.shape[2]):
                target[d, places[row]] = narrow(fresh[row, head, d], ring)


@compiled
def attend(q: Any, keys: Any, values: Any, slots: Any, first: Any, count: Any, scale: Any, out: Any) -> None:
    """Row r of slot slots[r] sees the count[r] positions from first[r] on, which may wrap around the ring's end."""
    capacity = keys.shape[3]
    scores = np.empty(capacity, np.float32)
    query = np.empty(q.shape[2], np.float32)
    for row in range(slots.shape[0]):
        start = first[row] % capacity
        straight = min(count[row], capacity - start)
        wrapped = count[row] - straight
        for head in range(q.shape[1]):
            for d in range(q.shape[2]):
                query[d] = q[row, head, d] * scale
            ring = keys[slots[row], head]
            _score(scores, query, ring, start, straight, 0)
            _score(scores, query, ring, 0, wrapped, straight)
            total = _softmax(scores, count[row])
            mixed, ring = out[row, head], values[slots[row], head]
            mixed[:] = np.float32(0.0)
            _mix(mixed, scores, ring, start, straight, 0)
            _mix(mixed, scores, ring, 0, wrapped, straight)
            for d in range(q.shape[2]):
                mixed[d] /= total


class ColumnCache(KVCache):
    """Rings of [head_dim, capacity] in bf16 or fp32: a key is a column.

    Raises ValueError for a head size that the passes of eight do not divide, and for other dtypes.
    """

    position_axis = 3

    def __init__(self, config: LMConfig, slots: int, tile: int, *, dtype: torch.dtype) -> None:
        if config.head_dim % 8:
            raise ValueError(f"compiled attention needs heads of a multiple of 8 numbers, not {config.head_dim}")
        super().__init__(config, slots, tile)
        shape = (config.num_layers, slots, config.num_heads, config.head_dim, self.capacity)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)
        self.key_arrays, self.value_arrays = as_array(self.keys), as_array(self.values)

    def attention(self, spans: Sequence[Span]) -> CompiledAttention:
        return CompiledAttention(self, spans)


class CompiledAttention:
    """Which row writes where and sees what in one step; called, it does so (see KVCache.attention)."""

    def __init__(self, cache: ColumnCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self.scale = np.float32(cache.keys.shape[3] ** -0.5)
        position = np.concatenate([np.arange(span.first, span.first + span.count) for span in spans])
        self.slots = np.concatenate([np.full(span.count, span.slot) for span in spans])
        self.places = position % cache.capacity
        self.count = np.minimum(position + 1, cache.window)
        self.first = position + 1 - self.count
        self.rows = len(position)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [rows, heads, head_dim] → [rows, heads, head_dim]; rows beyond the spans' come back as zeros."""
        cache, rows = self._cache, self.rows
        keys, values = cache.key_arrays[layer], cache.value_arrays[layer]
        store(keys, self.slots, self.places, k[:rows].float().numpy())
        store(values, self.slots, self.places, v[:rows].float().numpy())
        out = torch.zeros(q.shape, dtype=torch.float32)
        queries = q[:rows].float().numpy()
        attend(queries, keys, values, self.slots, self.first, self.count, self.scale, out.numpy())
        return out.to(q.dtype)

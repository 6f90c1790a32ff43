"""Attention over the slots' rings on CUDA: three kernels a layer, none of which knows who else is in the step.

`rope_store` rotates queries and keys and writes keys and values into the ring. `attend` takes up to QUERY_ROWS
consecutive rows of one slot, one head and one piece of the ring (flash-decoding: Dao et al. 2023), reads the piece's
keys that any of those rows sees, once, and leaves a partial result. `combine` adds a row's partial results up.

A row's bits depend on its own position alone. Pieces begin at fixed places of the ring, not of the window; within one,
keys are taken in fixed blocks; a block that only a neighbouring row sees adds exact zeros. A live row takes the same
path as sixteen rows of a prompt, padded: the products are hidden behind the reading of keys either way.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from graphs.ring_cache import FP8_EXPONENT, RingCache
from graphs.spans import KEY_BLOCK
from graphs.step_inputs import QUERY_ROWS
from graphs.triton_jit import exact_dots, interpreted, kernel, power_of_two

KEYS_AT_ONCE = 64  # divides a ring's capacity (KEY_BLOCK)
SPLIT_KEYS = 384  # 8 pieces of a 7B ring: 256 programs a slot and layer, so that one slot alone fills 132 processors


@kernel
def _scale_of(vector: tl.tensor, exponent: constexpr) -> tl.tensor:
    """graphs.ring_cache.fp8_scale."""
    largest = tl.max(tl.abs(vector), axis=0)
    shifted = (largest.to(tl.int32, bitcast=True) >> 23) - exponent
    return (tl.maximum(shifted, 1) << 23).to(tl.float32, bitcast=True)


@kernel
def _rope_store(
    packed: tl.tensor,
    meta: tl.tensor,
    cosine: tl.tensor,
    sine: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    scales_half: tl.tensor,
    table: tl.tensor,
    meta_stride: constexpr,
    slot_column: constexpr,
    heads: constexpr,
    head_dim: constexpr,
    half: constexpr,
    capacity: constexpr,
    page: constexpr,
    scaled: constexpr,
    exponent: constexpr,
) -> None:
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(meta + row * meta_stride + slot_column).to(tl.int64)
    position = tl.load(meta + row * meta_stride + slot_column + 1)
    if position >= 0:
        pair = tl.arange(0, half)
        used = pair < head_dim // 2
        c = tl.load(cosine + row * (head_dim // 2) + pair, mask=used, other=0.0)
        s = tl.load(sine + row * (head_dim // 2) + pair, mask=used, other=0.0)
        width: constexpr = heads * head_dim
        source = packed + row.to(tl.int64) * 3 * width + head * head_dim + 2 * pair
        q0 = tl.load(source, mask=used, other=0.0).to(tl.float32)
        q1 = tl.load(source + 1, mask=used, other=0.0).to(tl.float32)
        target = query + row.to(tl.int64) * width + head * head_dim + 2 * pair
        tl.store(target, (q0 * c - q1 * s).to(query.dtype.element_ty), mask=used)
        tl.store(target + 1, (q0 * s + q1 * c).to(query.dtype.element_ty), mask=used)
        k0 = tl.load(source + width, mask=used, other=0.0).to(tl.float32)
        k1 = tl.load(source + width + 1, mask=used, other=0.0).to(tl.float32)
        v0 = tl.load(source + 2 * width, mask=used, other=0.0).to(tl.float32)
        v1 = tl.load(source + 2 * width + 1, mask=used, other=0.0).to(tl.float32)
        # Rounded to the model's dtype first, as every other backend stores them.
        r0 = (k0 * c - k1 * s).to(packed.dtype.element_ty).to(tl.float32)
        r1 = (k0 * s + k1 * c).to(packed.dtype.element_ty).to(tl.float32)
        place = (slot * heads + head) * capacity + position % capacity
        if page > 0:
            index = position % capacity
            held = tl.load(table + slot * (capacity // page) + index // page).to(tl.int64)
            place = (held * heads + head) * page + index % page
        if scaled:
            key_scale = _scale_of(tl.maximum(tl.abs(r0), tl.abs(r1)), exponent)
            value_scale = _scale_of(tl.maximum(tl.abs(v0), tl.abs(v1)), exponent)
            tl.store(scales + place, key_scale.to(tl.bfloat16))
            tl.store(scales + scales_half + place, value_scale.to(tl.bfloat16))
            r0, r1, v0, v1 = r0 / key_scale, r1 / key_scale, v0 / value_scale, v1 / value_scale
        ring = place * head_dim + 2 * pair
        tl.store(keys + ring, r0.to(keys.dtype.element_ty), mask=used)
        tl.store(keys + ring + 1, r1.to(keys.dtype.element_ty), mask=used)
        tl.store(values + ring, v0.to(values.dtype.element_ty), mask=used)
        tl.store(values + ring + 1, v1.to(values.dtype.element_ty), mask=used)


@kernel
def _attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    scales_half: tl.tensor,
    table: tl.tensor,
    blocks: tl.tensor,
    partial: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    softmax_scale: tl.tensor,
    window: constexpr,
    capacity: constexpr,
    page: constexpr,
    heads: constexpr,
    head_dim: constexpr,
    dim_block: constexpr,
    splits: constexpr,
    split_keys: constexpr,
    query_rows: constexpr,
    key_rows: constexpr,
    scaled: constexpr,
    precision: constexpr,
) -> None:
    """blocks [n, 4] int32: start, count, slot and first position of up to query_rows rows.

    page: positions of a page, 0 where rings are in one piece; table [slots, capacity / page] int32 names the pages."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(blocks + block * 4)
    count = tl.load(blocks + block * 4 + 1)
    slot = tl.load(blocks + block * 4 + 2).to(tl.int64)
    first = tl.load(blocks + block * 4 + 3)
    if count == 0:
        return
    offset = tl.arange(0, query_rows)
    dim = tl.arange(0, dim_block)
    lane = (offset < count)[:, None] & (dim < head_dim)[None, :]
    position = first + offset
    ring = position % capacity
    seen = tl.where(offset < count, tl.minimum(position + 1, window), 0)
    last = first + count - 1
    last_ring = last % capacity
    reach = tl.minimum(last + 1, window + count - 1)  # how far back any of these rows looks from the last
    rows = (start + offset).to(tl.int64)
    q = tl.load(query + (rows * heads + head)[:, None] * head_dim + dim[None, :], mask=lane, other=0.0)
    highest = tl.full((query_rows,), float("-inf"), tl.float32)
    weight = tl.zeros((query_rows,), tl.float32)
    mixed = tl.zeros((query_rows, dim_block), tl.float32)
    begin = split * split_keys
    stop = tl.minimum(begin + split_keys, tl.minimum(capacity, last + 1))  # before the ring is full, the rest is no key
    base = (slot * heads + head) * capacity
    for key in range(begin, stop, key_rows):
        index = key + tl.arange(0, key_rows)
        behind = last_ring - index
        behind = tl.where(behind < 0, behind + capacity, behind)
        exists = (behind < reach) & (index < capacity)
        place = base + index
        if page > 0:  # a page holds whole steps of this loop
            held = tl.load(table + slot * (capacity // page) + key // page).to(tl.int64)
            place = (tl.maximum(held, 0) * heads + head) * page + index % page
        where = place[:, None] * head_dim + dim[None, :]
        there = exists[:, None] & (dim < head_dim)[None, :]
        k = tl.load(keys + where, mask=there, other=0.0)
        if scaled:
            k = k.to(tl.float16).to(tl.float32)  # straight to bf16 it takes the slowest conversion there is (F2F)
        k = k.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * softmax_scale
        if scaled:
            scores *= tl.load(scales + place, mask=exists, other=0.0).to(tl.float32)[None, :]
        distance = ring[:, None] - index[None, :]
        distance = tl.where(distance < 0, distance + capacity, distance)
        scores = tl.where((distance < seen[:, None]) & exists[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        shares = tl.exp(scores - level[:, None])
        fade = tl.exp(highest - level)
        weight = weight * fade + tl.sum(shares, axis=1)
        if scaled:
            shares *= tl.load(scales + scales_half + place, mask=exists, other=0.0).to(tl.float32)[None, :]
        v = tl.load(values + where, mask=there, other=0.0)
        if scaled:
            v = v.to(tl.float16).to(tl.float32)
        v = v.to(q.dtype)
        mixed = mixed * fade[:, None] + tl.dot(shares.to(q.dtype), v, input_precision=precision)
        highest = higher
    result = (rows * heads + head) * splits + split
    tl.store(largest + result, highest, mask=offset < count)
    tl.store(total + result, weight, mask=offset < count)
    if stop > begin:
        tl.store(partial + result[:, None] * head_dim + dim[None, :], mixed, mask=lane)


@kernel
def _combine(
    partial: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    meta: tl.tensor,
    out: tl.tensor,
    meta_stride: constexpr,
    slot_column: constexpr,
    heads: constexpr,
    head_dim: constexpr,
    dim_block: constexpr,
    splits: constexpr,
    split_block: constexpr,
) -> None:
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(meta + row * meta_stride + slot_column + 1)
    split = tl.arange(0, split_block)
    dim = tl.arange(0, dim_block)
    first = (row.to(tl.int64) * heads + head) * splits
    real = split < tl.where(position >= 0, splits, 0)
    high = tl.load(largest + first + split, mask=real, other=float("-inf"))
    highest = tl.max(high, axis=0)
    share = tl.exp(high - tl.where(highest == float("-inf"), 0.0, highest))
    weight = tl.sum(share * tl.load(total + first + split, mask=real, other=0.0), axis=0)
    used = (high > float("-inf"))[:, None] & (dim < head_dim)[None, :]
    mixed = tl.load(partial + (first + split)[:, None] * head_dim + dim[None, :], mask=used, other=0.0)
    result = tl.sum(mixed * share[:, None], axis=0) / tl.where(weight > 0.0, weight, 1.0)
    place = out + (row.to(tl.int64) * heads + head) * head_dim + dim
    tl.store(place, result.to(out.dtype.element_ty), mask=dim < head_dim)


class TritonAttention:
    """The three kernels over one cache, for steps of a fixed number of rows. Buffers are allocated per call (a captured
    graph keeps them in its pool)."""

    def __init__(self, cache: RingCache, heads: int, head_dim: int) -> None:
        self._cache, self._heads, self._head_dim = cache, heads, head_dim
        self.splits = -(-cache.capacity // SPLIT_KEYS)
        paged = cache.page_table is not None
        self._table = cache.page_table if paged else cache.keys  # which then nobody reads
        self._page = KEY_BLOCK if paged else 0

    def __call__(
        self, layer: int, packed: Tensor, meta: Tensor, slot_column: int, blocks: Tensor, turn: tuple[Tensor, Tensor]
    ) -> Tensor:
        """packed [rows, 3 · dim] → [rows, dim]; rows of position -1 write nothing and come back as zeros.

        meta [rows, …] int32 holds slot and position from slot_column on; blocks [n, 4] int32 as `_attend` takes them;
        turn: cosine and sine [rows, head_dim / 2] fp32 of the rows' positions.
        """
        return self.attend(layer, self.store(layer, packed, meta, slot_column, turn), meta, slot_column, blocks)

    def store(self, layer: int, packed: Tensor, meta: Tensor, slot_column: int, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Writes the rows' keys and values; returns their rotated queries [rows, dim]."""
        cache, heads, head_dim = self._cache, self._heads, self._head_dim
        rows = packed.shape[0]
        query = packed.new_empty(rows, heads * head_dim)
        scales, scales_half = self._scales(layer)
        _rope_store[(rows, heads)](
            packed, meta, turn[0], turn[1], query, cache.keys[layer], cache.values[layer], scales, scales_half,
            self._table, meta_stride=meta.stride(0), slot_column=slot_column, heads=heads, head_dim=head_dim,
            half=power_of_two(head_dim // 2), capacity=cache.capacity, page=self._page,
            scaled=cache.scales is not None, exponent=FP8_EXPONENT, num_warps=1,
        )  # fmt: skip
        return query

    def attend(self, layer: int, query: Tensor, meta: Tensor, slot_column: int, blocks: Tensor) -> Tensor:
        """Rotated queries [rows, dim] over rings that hold the rows' own keys already → [rows, dim]."""
        cache, heads, head_dim = self._cache, self._heads, self._head_dim
        rows = query.shape[0]
        scales, scales_half = self._scales(layer)
        partial = torch.empty(rows, heads, self.splits, head_dim, device=query.device, dtype=torch.float32)
        largest = torch.empty(rows, heads, self.splits, device=query.device, dtype=torch.float32)
        total = torch.empty_like(largest)
        # At least 16: what a tensor core's product needs of every dimension.
        dim_block = max(16, power_of_two(head_dim))
        _attend[(blocks.shape[0], heads, self.splits)](
            query, cache.keys[layer], cache.values[layer], scales, scales_half, self._table, blocks, partial, largest,
            total, head_dim**-0.5, window=cache.window, capacity=cache.capacity, page=self._page, heads=heads,
            head_dim=head_dim,
            dim_block=dim_block, splits=self.splits, split_keys=SPLIT_KEYS, query_rows=QUERY_ROWS,
            key_rows=KEYS_AT_ONCE, scaled=cache.scales is not None,
            precision="ieee" if exact_dots(query) or interpreted() else "tf32", num_warps=4,
            num_stages=4 if self._page else 3,  # looking a page up takes one of them
        )  # fmt: skip
        out = torch.empty_like(query)
        _combine[(rows, heads)](
            partial, largest, total, meta, out, meta_stride=meta.stride(0), slot_column=slot_column, heads=heads,
            head_dim=head_dim, dim_block=dim_block, splits=self.splits, split_block=power_of_two(self.splits),
            num_warps=4,
        )  # fmt: skip
        return out

    def _scales(self, layer: int) -> tuple[Tensor, int]:
        """The layer's scales of keys, and how many numbers on those of values are; without fp8 nobody reads them."""
        if self._cache.scales is None:
            return self._cache.keys[layer], 0
        return self._cache.scales[:, layer], self._cache.scales.stride(0)

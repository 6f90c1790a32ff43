"""Linear layers on CUDA for few rows: norm, product, gate and residual in one kernel each.

At 1 to 100 rows a product is the reading of its weights. So every weight is read once, what surrounds the product is
done while it streams, and all sums have one order: a program takes ROWS rows (padded), runs through the whole input
width in steps of one size, and never shares a sum with another program. Hence a row's bits do not depend on how many
rows there are or where it stands, which vendor libraries do not promise: they choose another kernel for another count.

The norm needs no pass of its own: x·rsqrt(mean(x²)+ε)·α times W is (x·α times W)·rsqrt(mean(x²)+ε), and the mean comes
out of the same walk over x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from graphs.triton_jit import exact_dots, interpreted, kernel, power_of_two
from models.layers import RMS_EPS

ROWS = 64  # one warpgroup's tensor-core tile; 96 rows (32 slots and a prompt's tile) take two, the second from cache


_PROCESSORS = 132  # of an H100
_SHARED_BYTES = 200 << 10  # of the 227 KiB that a program can have on one


class Tile(NamedTuple):
    """How a product is cut; a function of the weight's shape alone, or bits would depend on the step's."""

    outputs: int
    inputs: int
    stages: int


def tile_of(outputs: int, inputs: int, item_bytes: int, gated: bool = False) -> Tile:
    """Enough programs for all processors, and on each as much of the weight under way as shared memory holds."""
    width = 32 if gated else 64 if outputs >= 8192 else 32 if outputs >= 2048 else 16
    depth = max(16, min(256 // item_bytes, power_of_two(inputs)))
    programs_each = 1 if -(-outputs // width) <= _PROCESSORS else 2
    stage_bytes = (ROWS + width * (2 if gated else 1)) * depth * item_bytes
    most = 8 if item_bytes == 2 else 2  # fp32 products keep operands in registers
    return Tile(width, depth, max(2, min(most, _SHARED_BYTES // programs_each // stage_bytes)))


@kernel
def _linear(
    x: tl.tensor,
    weight: tl.tensor,
    alpha: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    out_stride: tl.tensor,
    outputs: constexpr,
    inputs: constexpr,
    normed: constexpr,
    gated: constexpr,
    added: constexpr,
    eps: constexpr,
    row_block: constexpr,
    output_block: constexpr,
    input_block: constexpr,
    precision: constexpr,
) -> None:
    """out [rows, outputs] = [residual +] f(x [rows, inputs]) · weightᵀ; gated: weight holds gate above value."""
    row_blocks = tl.cdiv(rows, row_block)
    # Neighbouring programs share a piece of the weight: the second reads it from the cache.
    row = (tl.program_id(0) % row_blocks) * row_block + tl.arange(0, row_block)
    column = (tl.program_id(0) // row_blocks) * output_block + tl.arange(0, output_block)
    step = tl.arange(0, input_block)
    even: constexpr = inputs % input_block == 0
    row_there, column_there = (row < rows)[:, None], (column < outputs)[:, None]
    left = x + row.to(tl.int64)[:, None] * inputs
    right = weight + column.to(tl.int64)[:, None] * inputs
    sums = tl.zeros((row_block, output_block), tl.float32)
    values = tl.zeros((row_block, output_block), tl.float32)
    squares = tl.zeros((row_block,), tl.float32)
    for start in range(0, inputs, input_block):
        index = start + step
        inside = (index < inputs)[None, :]
        a = tl.load(left + index[None, :], mask=row_there if even else row_there & inside, other=0.0)
        w = tl.load(right + index[None, :], mask=column_there if even else column_there & inside, other=0.0)
        if normed:
            wide = a.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            a = (wide * tl.load(alpha + index, mask=index < inputs, other=0.0)[None, :]).to(w.dtype)
        sums = tl.dot(a, tl.trans(w), sums, input_precision=precision)
        if gated:
            u = tl.load(
                right + outputs * inputs + index[None, :],
                mask=column_there if even else column_there & inside,
                other=0.0,
            )
            values = tl.dot(a, tl.trans(u), values, input_precision=precision)
    if normed:
        scale = tl.rsqrt(squares / inputs + eps)[:, None]
        sums *= scale
        values *= scale
    if gated:
        # Rounded as a packed projection would have been stored.
        gate = sums.to(weight.dtype.element_ty).to(tl.float32)
        sums = gate / (1.0 + tl.exp(-gate)) * values.to(weight.dtype.element_ty).to(tl.float32)
    there = row_there & (column < outputs)[None, :]
    if added:
        before = tl.load(residual + row.to(tl.int64)[:, None] * outputs + column[None, :], mask=there, other=0.0)
        sums += before.to(tl.float32)
    target = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=there)


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    alpha: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x [rows, inputs] through weight [outputs, inputs] ([2 · outputs, inputs] if gated) → [rows, outputs].

    alpha [inputs] fp32: RMS norm before; residual [rows, outputs]: added after; out: where to, of any float dtype.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    result = x.new_empty(rows, outputs) if out is None else out
    tile = tile_of(outputs, inputs, weight.element_size(), gated)
    grid = (-(-rows // ROWS) * -(-outputs // tile.outputs),)
    _linear[grid](
        x, weight, x if alpha is None else alpha, x if residual is None else residual, result, rows, result.stride(0),
        outputs=outputs, inputs=inputs, normed=alpha is not None, gated=gated, added=residual is not None, eps=RMS_EPS,
        row_block=ROWS, output_block=tile.outputs, input_block=tile.inputs,
        precision="ieee" if exact_dots(weight) or interpreted() else "tf32",
        num_warps=4, num_stages=tile.stages,
    )  # fmt: skip
    return result


@kernel
def _norm(
    x: tl.tensor,
    alpha: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    index_stride: constexpr,
    dim: constexpr,
    block: constexpr,
    eps: constexpr,
) -> None:
    row = tl.program_id(0)
    source = tl.load(index + row * index_stride).to(tl.int64)
    place = tl.arange(0, block)
    inside = place < dim
    wide = tl.load(x + source * dim + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    normed = wide * scale * tl.load(alpha + place, mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64) * dim + place, normed.to(out.dtype.element_ty), mask=inside)


def norm_of(x: Tensor, alpha: Tensor, index: Tensor) -> Tensor:
    """The norm of x's rows index [n] int32 (any stride) → [n, dim]."""
    dim = x.shape[1]
    out = x.new_empty(index.shape[0], dim)
    _norm[(index.shape[0],)](
        x, alpha, index, out, index_stride=index.stride(0), dim=dim, block=power_of_two(dim), eps=RMS_EPS, num_warps=8
    )
    return out


@kernel
def _embed(
    meta: tl.tensor,
    table: tl.tensor,
    starts: tl.tensor,
    given: tl.tensor,
    out: tl.tensor,
    meta_stride: constexpr,
    streams: constexpr,
    given_column: constexpr,
    dim: constexpr,
    block: constexpr,
) -> None:
    row = tl.program_id(0)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < dim
    source = meta + row * meta_stride
    total = tl.zeros((block,), tl.float32)
    for stream in range(streams):
        token = tl.load(source + stream)
        entry = tl.where(token >= 0, tl.load(starts + stream) + token, 0).to(tl.int64)  # entry 0 is zeros
        total += tl.load(table + entry * dim + place, mask=inside, other=0.0).to(tl.float32)
    is_given = tl.load(source + given_column) > 0
    override = tl.load(given + row.to(tl.int64) * dim + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.where(is_given, override, total)
    tl.store(out + row.to(tl.int64) * dim + place, total.to(out.dtype.element_ty), mask=inside)


def embed(meta: Tensor, given_column: int, table: Tensor, starts: Tensor, given: Tensor) -> Tensor:
    """meta [rows, …] int32: a row's tokens first, at given_column whether its embedding, [dim], is given instead."""
    rows, dim = given.shape
    out = torch.empty_like(given)
    block = min(1024, power_of_two(dim))
    _embed[(rows, -(-dim // block))](
        meta, table, starts, given, out, meta_stride=meta.stride(0), streams=starts.shape[0], given_column=given_column,
        dim=dim, block=block, num_warps=4,
    )  # fmt: skip
    return out


@kernel
def _depth_attend(
    packed: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    codebook: tl.tensor,
    softmax_scale: tl.tensor,
    heads: constexpr,
    head_dim: constexpr,
    dim_block: constexpr,
    codebooks: constexpr,
) -> None:
    row, head = tl.program_id(0), tl.program_id(1)
    width: constexpr = heads * head_dim
    dim = tl.arange(0, dim_block)
    inside = dim < head_dim
    place = tl.arange(0, codebooks)
    there = (place <= codebook)[:, None] & inside[None, :]
    own = packed + (codebook * rows + row) * 3 * width + head * head_dim + dim
    past = packed + ((place * rows + row) * 3 * width + head * head_dim)[:, None] + dim[None, :]
    q = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(past + width, mask=there, other=0.0).to(tl.float32)
    scores = tl.where(place <= codebook, tl.sum(q[None, :] * k, axis=1) * softmax_scale, float("-inf"))
    shares = tl.exp(scores - tl.max(scores, axis=0))
    v = tl.load(past + 2 * width, mask=there, other=0.0).to(tl.float32)
    mixed = tl.sum(v * (shares / tl.sum(shares, axis=0))[:, None], axis=0)
    tl.store(out + row * width + head * head_dim + dim, mixed.to(out.dtype.element_ty), mask=inside)


def depth_attend(packed: Tensor, codebook: int, heads: int) -> Tensor:
    """packed [8, rows, 3 · dim], filled up to `codebook` → what that position sees, [rows, dim]."""
    codebooks, rows, width = packed.shape
    dim = width // 3
    out = packed.new_empty(rows, dim)
    head_dim = dim // heads
    _depth_attend[(rows, heads)](
        packed, out, rows, codebook, head_dim**-0.5, heads=heads, head_dim=head_dim, dim_block=power_of_two(head_dim),
        codebooks=codebooks, num_warps=1,
    )  # fmt: skip
    return out

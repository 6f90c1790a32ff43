"""Drawing a token on CUDA in one kernel a codebook: graphs.sampling's rule, without a sort.

The k-th largest logit is found bit by bit: fp32 numbers, their bits turned so that they order as unsigned integers, are
counted against 32 candidates. The same program then adds the token's embedding to what the next depth step starts from,
so that a codebook costs no further launch.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from graphs.triton_jit import kernel, power_of_two

# splitmix64, as in graphs.sampling
_GOLDEN: constexpr = constexpr(0x9E3779B97F4A7C15)
_MIX_1: constexpr = constexpr(0xBF58476D1CE4E5B9)
_MIX_2: constexpr = constexpr(0x94D049BB133111EB)


@kernel
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@kernel
def _draw(
    logits: tl.tensor,
    asked: tl.tensor,
    tokens: tl.tensor,
    addend: tl.tensor,
    table: tl.tensor,
    start: tl.tensor,
    logits_stride: tl.tensor,
    addend_stride: tl.tensor,
    stream: tl.tensor,
    asked_stride: constexpr,
    parameters: constexpr,
    key_column: constexpr,
    given_column: constexpr,
    streams: constexpr,
    card: constexpr,
    card_block: constexpr,
    dim: constexpr,
    dim_block: constexpr,
) -> None:
    row = tl.program_id(0)
    mine = asked + row * asked_stride
    temperature = tl.load(mine + parameters).to(tl.float32, bitcast=True)
    top_k = tl.minimum(tl.load(mine + parameters + 1), card)
    token = tl.arange(0, card_block)
    inside = token < card
    scores = tl.load(logits + row.to(tl.int64) * logits_stride + token, mask=inside, other=float("-inf"))
    if temperature > 0.0:
        bits = scores.to(tl.int32, bitcast=True)
        ordered = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
        ordered = tl.where(inside, ordered, 0)
        threshold = tl.full((), 0, tl.uint32)
        for bit in range(32):
            candidate = threshold | (tl.full((), 1, tl.uint32) << (31 - bit))
            reached = tl.sum((ordered >= candidate).to(tl.int32), axis=0)
            threshold = tl.where(reached >= top_k, candidate, threshold)
        low = tl.load(mine + key_column).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(mine + key_column + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
        own = _mix((high << 32 | low) + (stream + 1).to(tl.uint64))
        hashed = _mix(own + (token + 1).to(tl.uint64) * _GOLDEN)
        uniform = ((hashed >> 41).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        noisy = scores / temperature - tl.log(-tl.log(uniform))
        scores = tl.where(inside & (ordered >= threshold), noisy, float("-inf"))
    drawn = tl.argmax(scores, axis=0).to(tl.int32)
    known = tl.load(mine + given_column + stream)
    drawn = tl.where(known >= 0, known, drawn)
    tl.store(tokens + row * streams + stream, drawn)
    if dim > 0:
        place = tl.arange(0, dim_block)
        used = place < dim
        entry = tl.load(table + drawn.to(tl.int64) * dim + place, mask=used, other=0.0).to(tl.float32)
        before = tl.load(addend + row.to(tl.int64) * addend_stride + place, mask=used, other=0.0).to(tl.float32)
        target = start + row.to(tl.int64) * dim + place
        tl.store(target, (before + entry).to(start.dtype.element_ty), mask=used)


def warps_of(card: int) -> int:
    """A program holds a whole row of logits in registers."""
    return 32 if card > 8192 else 8


def draw(
    logits: Tensor,
    asked: Tensor,
    columns: tuple[int, int, int],
    stream: int,
    tokens: Tensor,
    following: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Draws tokens[:, stream] [rows, 9] int32 from logits [rows, card] fp32.

    asked [rows, …] int32: from columns[0] on temperature (the bits of a float) and top-k, from columns[1] on the row's
    64-bit key, low word first, from columns[2] on the tokens that are given (-2: the model chooses).
    following: what the next depth step adds to the token's entry, [rows, dim], and the table of entries; returns the
    sum, or an empty tensor if there is no next step.
    """
    rows, card = logits.shape
    addend, table = following if following is not None else (logits[:, :0], logits)
    start = table.new_empty(rows, addend.shape[1])
    _draw[(rows,)](
        logits, asked, tokens, addend, table, start, logits.stride(0), addend.stride(0), stream,
        asked_stride=asked.stride(0), parameters=columns[0], key_column=columns[1], given_column=columns[2],
        streams=tokens.shape[1], card=card, card_block=power_of_two(card), dim=addend.shape[1],
        dim_block=power_of_two(max(1, addend.shape[1])), num_warps=warps_of(card),
    )  # fmt: skip
    return start

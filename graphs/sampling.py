"""Drawing tokens with randomness that is a function of (seed, column, stream, token) and of nothing else.

A conversation's tokens may not depend on who else is in the batch, and must come out the same when it is replayed
elsewhere. So there is no generator with a state: every candidate token gets its own hashed Gumbel noise, and the
largest sum of scaled logit and noise wins (the Gumbel-max trick, which draws from the softmax exactly).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOP_K = 512  # fixed for all rows, so that one slot's top-k cannot change how another's ties fall

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64, splitmix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True)
class SamplingRows:
    """Per-row parameters, all [rows]: temperatures fp32 (0 = greedy), top-k and seeds and columns int64."""

    text_temperature: Tensor
    text_top_k: Tensor
    audio_temperature: Tensor
    audio_top_k: Tensor
    seed: Tensor
    column: Tensor  # the column being filled, which serves as the counter


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014); int64 products wrap, as they must."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def gumbel(seed: Tensor, column: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise [rows, n] fp32 for candidate tokens [rows, n]; seed, column: [rows] int64."""
    row = _mix(_mix(seed + _GOLDEN) + column * _GOLDEN + (stream + 1))
    # 23 bits: with its half added, fp32 still holds each exactly, so the result is never 0 nor 1.
    bits = _shift(_mix(row.unsqueeze(1) + (tokens + 1) * _GOLDEN), 41)
    uniform = (bits.float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, seed: Tensor, column: Tensor, stream: int) -> Tensor:
    """Draws one token a row from the softmax of its top-k logits; temperature 0 takes the largest.

    logits: [rows, card] fp32; temperature: [rows] fp32; top_k: [rows] int64 in 1..MAX_TOP_K; seed, column as in
    `gumbel`; stream: 0 text, 1..8 the agent's codebooks. Returns [rows] int64.
    """
    best, tokens = torch.topk(logits, min(MAX_TOP_K, logits.shape[-1]), dim=-1)
    drawn = temperature.unsqueeze(1) > 0
    noise = gumbel(seed, column, stream, tokens)
    scaled = best / torch.where(drawn, temperature.unsqueeze(1), 1.0)
    scores = torch.where(drawn, scaled + noise, best)
    rank = torch.arange(tokens.shape[1], device=logits.device)
    scores = scores.masked_fill(rank >= top_k.unsqueeze(1), float("-inf"))
    return tokens.gather(1, scores.argmax(dim=-1, keepdim=True)).squeeze(1)

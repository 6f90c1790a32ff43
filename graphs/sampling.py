"""Drawing tokens with randomness that is a function of (seed, column, stream, token) and of nothing else.

A conversation's tokens may not depend on who else is in the batch, and must come out the same when it is replayed
elsewhere. So there is no generator with a state: every token of the vocabulary gets its own hashed Gumbel noise, and
the largest sum of scaled logit and noise wins (the Gumbel-max trick, which draws from the softmax exactly). Top-k keeps
the tokens whose logit reaches the k-th largest; where logits tie there, all of them, so that no sort decides.

Three implementations of one rule: torch operators for a device; for the CPU, where torch's top-k and 64-bit integer
operators took ten times as long (107 against 8 µs for 4 rows of 2,048), a compiled pass, or numpy without numba.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.config import MAX_TOP_K

HAS_NUMBA = importlib.util.find_spec("numba") is not None

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment and multipliers (Steele et al. 2014)
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

Words = npt.NDArray[np.uint64]
Reals = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingRows:
    """Per-row parameters, each [rows]: temperatures fp32 (0 = greedy), top-k, seeds and columns int64."""

    text_temperature: Reals
    text_top_k: npt.NDArray[np.int64]
    audio_temperature: Reals
    audio_top_k: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]  # the column being filled, which serves as the counter


class Sampler(Protocol):
    """Draws for the rows of one step."""

    def draw(self, logits: Tensor, stream: int) -> Tensor:
        """logits [rows, card] fp32 of stream 0 (text) or 1-8 (the agent's codebooks) → tokens [rows] int64."""
        ...


def make_sampler(rows: SamplingRows, device: torch.device) -> Sampler:
    if device.type != "cpu":
        return DeviceSampler(rows, device)
    if HAS_NUMBA:
        from graphs.compiled_sampling import CompiledSampler

        return CompiledSampler(rows)
    return HostSampler(rows)


def row_keys(rows: SamplingRows) -> Words:
    """What a row's randomness is made of, [rows]: a hash of its seed and column, to which a stream is added."""
    with np.errstate(over="ignore"):
        seeded = _mix(rows.seed.astype(np.uint64) + np.uint64(_GOLDEN))
        keys: Words = seeded + rows.column.astype(np.uint64) * np.uint64(_GOLDEN)
    return keys


class HostSampler:
    """On the CPU, in numpy, whose partition and integer arithmetic are vectorised."""

    def __init__(self, rows: SamplingRows) -> None:
        self._rows = rows
        self._row_keys = row_keys(rows)

    def stream_keys(self, stream: int) -> Words:
        """What a row's randomness in one stream is made of, [rows]."""
        with np.errstate(over="ignore"):
            return _mix(self._row_keys + np.uint64(stream + 1))

    def noise(self, stream: int, card: int) -> Reals:
        """Standard Gumbel noise [rows, card]."""
        with np.errstate(over="ignore"):
            row = self.stream_keys(stream)
            mixed = _mix(row[:, None] + np.arange(1, card + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
        # 23 bits: with its half added, fp32 still holds each exactly, so the result is never 0 nor 1.
        uniform = ((mixed >> np.uint64(41)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
        noise: Reals = -np.log(-np.log(uniform))
        return noise

    def draw(self, logits: Tensor, stream: int) -> Tensor:
        scores, (temperature, top_k) = logits.numpy(), parameters(self._rows, stream)
        drawn = temperature > 0
        if drawn.any():
            threshold = kth_largest(scores, np.minimum(top_k, scores.shape[1]))
            scaled = scores / np.where(drawn, temperature, 1)[:, None] + self.noise(stream, scores.shape[1])
            # Only candidates of a row that draws; a greedy row keeps its plain logits.
            kept = np.where(scores >= threshold[:, None], scaled, -np.inf)
            scores = np.where(drawn[:, None], kept, scores)
        return torch.from_numpy(scores.argmax(axis=1))


class DeviceSampler:
    """The same rule in torch operators: no host synchronisation, shapes that depend on nothing but the rows."""

    def __init__(self, rows: SamplingRows, device: torch.device) -> None:
        def to_device(values: npt.NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(values).to(device)

        self._text = to_device(rows.text_temperature), to_device(rows.text_top_k)
        self._audio = to_device(rows.audio_temperature), to_device(rows.audio_top_k)
        seeded = _mix_tensor(to_device(rows.seed) + _signed(_GOLDEN))
        self._row_keys = seeded + to_device(rows.column) * _signed(_GOLDEN)

    def noise(self, stream: int, card: int) -> Tensor:
        """Standard Gumbel noise [rows, card] fp32."""
        return gumbel_noise(self._row_keys, stream, card)

    def draw(self, logits: Tensor, stream: int) -> Tensor:
        temperature, top_k = self._text if stream == 0 else self._audio
        card = logits.shape[-1]
        best = torch.topk(logits, min(MAX_TOP_K, card), dim=-1).values
        threshold = best.gather(1, (top_k.clamp(max=best.shape[1]) - 1).unsqueeze(1))
        drawn = (temperature > 0).unsqueeze(1)
        scaled = logits / torch.where(drawn, temperature.unsqueeze(1), 1.0) + self.noise(stream, card)
        kept = scaled.masked_fill(logits < threshold, float("-inf"))
        return torch.where(drawn, kept, logits).argmax(dim=-1)


def gumbel_noise(keys: Tensor, stream: int, card: int) -> Tensor:
    """Standard Gumbel noise [rows, card] fp32 of rows whose keys [rows] int64 hold the bits of `row_keys`."""
    row = _mix_tensor(keys + (stream + 1))
    tokens = torch.arange(1, card + 1, device=row.device)
    bits = _shift(_mix_tensor(row.unsqueeze(1) + tokens * _signed(_GOLDEN)), 41)
    return -torch.log(-torch.log((bits.float() + 0.5) * 2.0**-23))


def parameters(rows: SamplingRows, stream: int) -> tuple[Reals, npt.NDArray[np.int64]]:
    if stream == 0:
        return rows.text_temperature, rows.text_top_k
    return rows.audio_temperature, rows.audio_top_k


def kth_largest(scores: Reals, top_k: npt.NDArray[np.int64]) -> Reals:
    """The k-th largest of each row: scores [rows, card], top_k [rows] → [rows]. Rows of equal k share a pass."""
    threshold = np.empty(len(scores), dtype=np.float32)
    for k in np.unique(top_k):
        rows, place = top_k == k, scores.shape[1] - int(k)
        threshold[rows] = np.partition(scores[rows], place, axis=1)[:, place]
    return threshold


def _mix(x: Words) -> Words:
    """splitmix64's finaliser; products wrap, as they must."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """A 64-bit constant as torch's signed integers write it."""
    return word - (1 << 64) if word >= 1 << 63 else word

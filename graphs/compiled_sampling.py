"""The CPU's draw, compiled: threshold, hash and noise of those that reach it, largest. See graphs.sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.compiled import as_float, as_word, compiled
from graphs.sampling import HostSampler, parameters

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_LN_2 = np.float32(0.6931471805599453)


@compiled
def log(x: Any) -> Any:
    """The natural logarithm of a positive, normal float32, by a polynomial (error 1e-7) that vectorises.

    x = 2^e · m with m in [√½, √2); log m by the series in (m - 1) / (m + 1), whose odd powers fall off fast.
    """
    word = as_word(x)
    shifted = word - np.int32(0x3F3504F3)  # the bits of √½
    exponent = shifted >> np.int32(23)
    mantissa = as_float(word - (exponent << np.int32(23)))
    s = (mantissa - np.float32(1.0)) / (mantissa + np.float32(1.0))
    q = s * s
    series = np.float32(2.0 / 9.0)
    series = series * q + np.float32(2.0 / 7.0)
    series = series * q + np.float32(2.0 / 5.0)
    series = series * q + np.float32(2.0 / 3.0)
    series = series * q + np.float32(2.0)
    return np.float32(exponent) * _LN_2 + s * series


@compiled
def _cutoff(line: Any, k: int, words: Any) -> Any:
    """Leaves in `words` whole numbers ordered as `line` [card] is; returns one that the k largest alone reach.

    Those equal to the k-th reach it, too. Found by halving: to count what reaches a number costs 50 ns.
    """
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for token in range(line.shape[0]):
        word = as_word(line[token])
        word = word ^ ((word >> np.int32(31)) & np.int32(0x7FFFFFFF))
        words[token] = word
        least, most = min(least, word), max(most, word)
    low, high = np.int64(least), np.int64(most)  # so many reach `low`, fewer reach `high + 1`
    while low < high:
        middle = np.int32((low + high + 1) >> 1)
        reaching = np.int32(0)
        for token in range(line.shape[0]):
            reaching += np.int32(words[token] >= middle)
        if reaching == k:
            return middle
        if reaching > k:
            low = np.int64(middle)
        else:
            high = np.int64(middle) - 1
    return np.int32(low)


@compiled
def _mixed(x: Any) -> Any:
    """splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def draw_rows(logits: Any, temperature: Any, top_k: Any, row_keys: Any, stream: int, tokens: Any) -> None:
    """tokens [rows] = the largest of logit / temperature + noise among each row's top-k, where they are negative.

    logits [rows, card]; temperature fp32, top_k int64, row_keys uint64 [rows], hashed from seed and column. A row of
    temperature 0 takes its largest logit. Noise is made for the few tokens that can win.
    """
    card = logits.shape[1]
    words, kept, scores = np.empty(card, np.int32), np.empty(card, np.int32), np.empty(card, np.float32)
    for row in range(logits.shape[0]):
        if tokens[row] >= 0:
            continue
        line, count = logits[row], card
        if temperature[row] > np.float32(0.0):
            cutoff = _cutoff(line, min(top_k[row], card), words)
            count = 0
            for token in range(card):
                kept[count] = token
                count += words[token] >= cutoff
            scale, key = np.float32(1.0) / temperature[row], _mixed(row_keys[row] + np.uint64(stream + 1))
            for i in range(count):
                x = _mixed(key + (np.uint64(kept[i]) + np.uint64(1)) * _GOLDEN)
                # 23 bits: with its half added, fp32 still holds each exactly, so the result is never 0 nor 1.
                uniform = (np.float32(np.int32(x >> np.uint64(41))) + np.float32(0.5)) * np.float32(2.0**-23)
                scores[i] = line[kept[i]] * scale - log(-log(uniform))
            line = scores
        best, chosen = line[0], 0
        for i in range(count):
            if line[i] > best:
                best, chosen = line[i], i
        tokens[row] = kept[chosen] if temperature[row] > np.float32(0.0) else chosen


class CompiledSampler(HostSampler):
    """HostSampler's rule in one pass: no array of noise, no array of masks."""

    def draw(self, logits: Tensor, stream: int) -> Tensor:
        """See graphs.sampling.Sampler."""
        temperature, top_k = parameters(self._rows, stream)
        tokens = np.full(len(logits), -1, dtype=np.int64)
        draw_rows(logits.numpy(), temperature, top_k, self._row_keys, stream, tokens)
        return torch.from_numpy(tokens)

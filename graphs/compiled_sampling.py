"""The CPU's draw in one compiled pass over the logits: hash, noise, threshold, largest. See graphs.sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.compiled import as_float, as_word, compiled
from graphs.sampling import HostSampler, kth_largest, parameters

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
def _draw(logits: Any, temperature: Any, threshold: Any, row_keys: Any, scores: Any, tokens: Any) -> None:
    """tokens [rows] = the largest of logit / temperature + noise among those that reach the row's threshold.

    logits [rows, card]; row_keys [rows] uint64, hashed from seed, column and stream; scores [card] is working space.
    A row of temperature 0 takes its largest logit.
    """
    card = logits.shape[1]
    for row in range(logits.shape[0]):
        line = logits[row]
        if temperature[row] > np.float32(0.0):
            scale, least, key = np.float32(1.0) / temperature[row], threshold[row], row_keys[row]
            for token in range(card):
                x = key + (np.uint64(token) + np.uint64(1)) * _GOLDEN
                x = (x ^ (x >> np.uint64(30))) * _MIX_1
                x = (x ^ (x >> np.uint64(27))) * _MIX_2
                x = x ^ (x >> np.uint64(31))
                # 23 bits: with its half added, fp32 still holds each exactly, so the result is never 0 nor 1.
                uniform = (np.float32(np.int32(x >> np.uint64(41))) + np.float32(0.5)) * np.float32(2.0**-23)
                noisy = line[token] * scale - log(-log(uniform))
                scores[token] = noisy if line[token] >= least else np.float32(-3e38)
            line = scores
        best, chosen = line[0], 0
        for token in range(card):
            if line[token] > best:
                best, chosen = line[token], token
        tokens[row] = chosen


class CompiledSampler(HostSampler):
    """HostSampler's rule in one pass: no array of noise, no array of masks."""

    def draw(self, logits: Tensor, stream: int) -> Tensor:
        """See graphs.sampling.Sampler."""
        scores, (temperature, top_k) = logits.numpy(), parameters(self._rows, stream)
        threshold = kth_largest(scores, np.minimum(top_k, scores.shape[1]))
        tokens, space = np.empty(len(scores), dtype=np.int64), np.empty(scores.shape[1], dtype=np.float32)
        _draw(scores, temperature, threshold, self.stream_keys(stream), space, tokens)
        return torch.from_numpy(tokens)

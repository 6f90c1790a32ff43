"""The codec's two transformers as the CPU computes them, compiled by numba, in fp32 (see graphs.compiled_codec).

Two positions a frame and slot; both see only what the chunk's end leaves in the context (models.mimi_transformer).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.compiled import compiled, compiled_in_order, copy, exp, matmul
from graphs.compiled_attention import mix, score, soften
from graphs.compiled_layers import rotate

Array = npt.NDArray[Any]


class TransformerWeights(NamedTuple):
    """All layers one behind the other; see models.mimi_transformer.Layer."""

    norm1: Array  # weight and bias [layers, 2, dim], as norm2
    in_proj: Array
    out_proj: Array
    scale1: Array  # [layers, dim], as scale2
    norm2: Array
    linear1: Array
    linear2: Array
    scale2: Array


@compiled
def layer_norm(x: Any, norm: Any, out: Any) -> None:
    """out [rows, dim] = (x - mean) / sqrt(variance + 1e-5) · norm[0] + norm[1]."""
    for row in range(x.shape[0]):
        line, target = x[row], out[row]
        dim = np.float32(line.shape[0])
        total = np.float32(0.0)
        for i in range(line.shape[0]):
            total += line[i]
        mean = total / dim
        squares = np.float32(0.0)
        for i in range(line.shape[0]):
            squares += (line[i] - mean) * (line[i] - mean)
        scale = np.float32(1.0) / np.sqrt(squares / dim + np.float32(1e-5))
        for i in range(line.shape[0]):
            target[i] = (line[i] - mean) * scale * norm[0, i] + norm[1, i]


@compiled
def gelu(x: Any) -> None:
    """x [numbers] = x · Φ(x), the error function by Abramowitz and Stegun's 7.1.26 (absolute error 1.5e-7)."""
    for i in range(x.shape[0]):
        z = abs(x[i]) * np.float32(0.7071067811865476)
        t = np.float32(1.0) / (np.float32(1.0) + np.float32(0.3275911) * z)
        y = np.float32(1.061405429)
        y = y * t + np.float32(-1.453152027)
        y = y * t + np.float32(1.421413741)
        y = y * t + np.float32(-0.284496736)
        y = y * t + np.float32(0.254829592)
        tail = y * t * exp(-z * z)  # 1 - erf(z)
        x[i] *= np.float32(0.5) * (tail if x[i] < np.float32(0.0) else np.float32(2.0) - tail)


@compiled
def add_scaled(x: Any, branch: Any, scale: Any) -> None:
    """x [rows, dim] += branch · scale [dim]."""
    for row in range(x.shape[0]):
        line, other = x[row], branch[row]
        for i in range(scale.shape[0]):
            line[i] += other[i] * scale[i]


@compiled_in_order
def see(qkv: Any, ring: Any, slots: Any, frames: Any, context: int, scale: Any, mixed: Any) -> None:
    """Writes a frame's two keys and values of each slot and attends to what it sees; qkv [rows, 3, heads, head_dim].

    ring [slots, heads, 2, context, head_dim]; frames [slots of the call]; mixed [rows, heads, head_dim]. Which keys a
    position sees: models.mimi_transformer.visibility.
    """
    heads, dims = ring.shape[1], ring.shape[4]
    flat = ring.reshape(ring.size)
    scores = np.empty(context, np.float32)
    query, out = np.empty(dims, np.float32), np.empty(dims, np.float32)
    for index in range(slots.shape[0]):
        for half in range(2):
            place = (frames[index] * 2 + half) % context
            for head in range(heads):
                copy(ring[slots[index], head, 0, place], qkv[2 * index + half, 1, head])
                copy(ring[slots[index], head, 1, place], qkv[2 * index + half, 2, head])
        end = frames[index] * 2 + 2
        first = max(0, end - (context - 1))
        for head in range(heads):
            keys = (slots[index] * heads + head) * 2 * context * dims
            values = keys + context * dims
            for half in range(2):
                count = end - 1 + half - first
                start = first % context
                straight = min(count, context - start)
                for d in range(dims):
                    query[d] = qkv[2 * index + half, 0, head, d] * scale
                    out[d] = np.float32(0.0)
                at = start * dims
                score(query, 0, flat, keys + at, dims, scores, 0, straight, flat, values + at)
                score(query, 0, flat, keys, dims, scores, straight, count - straight, flat, values)
                total = soften(scores[:count])
                then = values + context * dims
                mix(scores, 0, flat, values + at, dims, straight, out, 0, flat, then + at)
                mix(scores, straight, flat, values, dims, count - straight, out, 0, flat, then)
                for d in range(dims):
                    mixed[2 * index + half, head, d] = out[d] / total


@compiled_in_order
def transform(x: Any, weights: Any, rings: Any, slots: Any, frames: Any, rotation: Any) -> None:
    """The transformer over x [2 * slots, dim], two positions a slot, in place; rings: one a layer."""
    rows, dim = x.shape
    heads, context, head_dim = rings[0].shape[1], rings[0].shape[3], rings[0].shape[4]
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    normed, branch = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    mixed = np.empty((rows, dim), np.float32)
    packed = np.empty((rows, 3 * dim), np.float32)
    split, apart = packed.reshape(rows, 3, heads, head_dim), mixed.reshape(rows, heads, head_dim)
    hidden = np.empty((rows, weights.linear2.shape[2] * 2), np.float32)
    for layer in range(len(rings)):
        layer_norm(x, weights.norm1[layer], normed)
        matmul(normed, weights.in_proj[layer], packed)
        rotate(split[:, 0], rotation[0], rotation[1])
        rotate(split[:, 1], rotation[0], rotation[1])
        see(split, rings[layer], slots, frames, context, scale, apart)
        matmul(mixed, weights.out_proj[layer], branch)
        add_scaled(x, branch, weights.scale1[layer])
        layer_norm(x, weights.norm2[layer], normed)
        matmul(normed, weights.linear1[layer], hidden)
        gelu(hidden.reshape(hidden.size))
        matmul(hidden, weights.linear2[layer], branch)
        add_scaled(x, branch, weights.scale2[layer])

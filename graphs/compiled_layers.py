"""The layers of the language model as the CPU computes them, compiled by numba: rows in, rows out, in fp32.

Weights of all layers lie in one array a kind, so that a whole transformer is one call. For the depth transformer, which
has weights of its own for every codebook, layer l of codebook c is c * layers + l.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graphs.compiled import add, compiled, compiled_in_order, copy, exp, gate, inputs_of, matmul, rms_norm, widen
from graphs.compiled_attention import attend, store
from graphs.compiled_sampling import draw_rows

Array = npt.NDArray[Any]


class LayerWeights(NamedTuple):
    """A transformer's layers one behind the other: norms [layers, dim], products [layers, …] of `pack`."""

    norm1: Array
    in_proj: Array
    out_proj: Array
    norm2: Array
    gate_in: Array
    gate_out: Array


class DepthWeights(NamedTuple):
    """What turns a hidden state into a frame's tokens, beside the depth transformer's layers."""

    text_head: Array
    inputs: Array  # the hidden state as each codebook takes it in, [8 · depth dim] outputs
    tables: Array  # embeddings of what was drawn last, [entries, depth dim]
    starts: Array  # [8] int64: where a codebook's begin
    heads: Array  # [8, …]


@compiled
def rotate(heads: Any, cosine: Any, sine: Any) -> None:
    """Turns the pairs (2i, 2i+1) of heads [rows, heads, head_dim] in place; cosine, sine [rows, head_dim / 2]."""
    for row in range(heads.shape[0]):
        for head in range(heads.shape[1]):
            vector = heads[row, head]
            for i in range(cosine.shape[1]):
                real, imaginary = vector[2 * i], vector[2 * i + 1]
                vector[2 * i] = real * cosine[row, i] - imaginary * sine[row, i]
                vector[2 * i + 1] = real * sine[row, i] + imaginary * cosine[row, i]


@compiled_in_order
def feed_forward(x: Any, normed: Any, branch: Any, weights: Any, layer: int) -> None:
    """x += gated feed-forward of norm2(x)."""
    rms_norm(x, weights.norm2[layer], normed)
    gate_in, gate_out = weights.gate_in[layer], weights.gate_out[layer]
    hidden = np.empty((x.shape[0], inputs_of(gate_out)), np.float32)  # its last columns may be padding
    packed = np.empty((x.shape[0], 2 * hidden.shape[1]), np.float32)
    matmul(normed, gate_in, packed)
    gate(packed, hidden)
    matmul(hidden, gate_out, branch)
    add(x, branch)


@compiled_in_order
def temporal(
    x: Any, weights: Any, rotation: Any, keys: Any, values: Any, blocks: Any, head_hop: int, rows: Any, scale: Any
) -> None:
    """All temporal layers over x [rows, dim] in place.

    rotation: cosine and sine; rows: slot, place, first position seen and count of each row; the rest as in attend.
    """
    count, dim = x.shape
    heads = keys.shape[2]
    slots, places, first, seen = rows
    normed, branch = np.empty((count, dim), np.float32), np.empty((count, dim), np.float32)
    packed, mixed = np.empty((count, 3 * dim), np.float32), np.empty((count, dim), np.float32)
    split, apart = packed.reshape(count, 3, heads, dim // heads), mixed.reshape(count, heads, dim // heads)
    for layer in range(weights.norm1.shape[0]):
        rms_norm(x, weights.norm1[layer], normed)
        matmul(normed, weights.in_proj[layer], packed)
        rotate(split[:, 0], rotation[0], rotation[1])
        rotate(split[:, 1], rotation[0], rotation[1])
        store(keys[layer], blocks, head_hop, slots, places, split[:, 1])
        store(values[layer], blocks, head_hop, slots, places, split[:, 2])
        attend(split[:, 0], keys[layer], values[layer], blocks, head_hop, slots, first, seen, scale, apart)
        matmul(mixed, weights.out_proj[layer], branch)
        add(x, branch)
        feed_forward(x, normed, branch, weights, layer)


@compiled
def depth_attend(packed: Any, keys: Any, values: Any, codebook: int, mixed: Any) -> None:
    """Writes position `codebook` of this frame's cache and attends to positions 0..codebook.

    packed [rows, 3 · dim]; keys, values [rows, heads, 8, head_dim]; mixed [rows, dim].
    """
    rows, heads, _, head_dim = keys.shape
    dim = heads * head_dim
    scale = np.float32(1.0) / np.sqrt(np.float32(head_dim))
    weights = np.empty(codebook + 1, np.float32)
    for row in range(rows):
        for head in range(heads):
            start = head * head_dim
            q = packed[row, start : start + head_dim]
            copy(keys[row, head, codebook], packed[row, dim + start :])
            copy(values[row, head, codebook], packed[row, 2 * dim + start :])
            largest = np.float32(-1e30)
            for place in range(codebook + 1):
                score = np.float32(0.0)
                for i in range(head_dim):
                    score += q[i] * keys[row, head, place, i]
                weights[place] = score * scale
                largest = max(largest, weights[place])
            total = np.float32(0.0)
            for place in range(codebook + 1):
                weights[place] = exp(weights[place] - largest)
                total += weights[place]
            out = mixed[row, start : start + head_dim]
            for i in range(head_dim):
                out[i] = np.float32(0.0)
            for place in range(codebook + 1):
                weight = weights[place] / total
                for i in range(head_dim):
                    out[i] += weight * values[row, head, place, i]


@compiled
def embed(tokens: Any, starts: Any, table: Any, out: Any) -> None:
    """out [rows, dim] = the sum of the tokens' rows in the joined table; token -1 contributes nothing."""
    for row in range(tokens.shape[0]):
        target = out[row]
        for i in range(target.shape[0]):
            target[i] = np.float32(0.0)
        for stream in range(tokens.shape[1]):
            if tokens[row, stream] >= 0:
                entry = table[starts[stream] + tokens[row, stream]]
                for i in range(entry.shape[0]):
                    target[i] += widen(entry[i])


@compiled
def add_entries(x: Any, table: Any, start: int, tokens: Any) -> None:
    """x [rows, dim] += table[start + tokens]."""
    for row in range(x.shape[0]):
        entry, target = table[start + tokens[row]], x[row]
        for i in range(entry.shape[0]):
            target[i] += widen(entry[i])


@compiled_in_order
def answer(
    hidden: Any, weights: Any, layers: Any, heads: int, sampling: Any, tokens: Any, text_logits: Any, logits: Any
) -> None:
    """Draws a frame's tokens [rows, 9] from hidden [rows, dim]; those that are not negative are given, and stay.

    sampling: temperature and top-k of text and of audio, and row keys, each [rows] (see graphs.sampling).
    text_logits [rows, text card]; logits [8 or 1, rows, card]: all that were computed, or the last.
    """
    text_temperature, text_top_k, temperature, top_k, row_keys = sampling
    rows, codebooks = hidden.shape[0], weights.starts.shape[0]
    depth = layers.norm1.shape[0] // codebooks
    dim = layers.norm1.shape[1]
    matmul(hidden, weights.text_head, text_logits)
    draw_rows(text_logits, text_temperature, text_top_k, row_keys, 0, tokens[:, 0])
    inputs = np.empty((rows, codebooks * dim), np.float32)
    matmul(hidden, weights.inputs, inputs)
    keys = np.empty((depth, rows, heads, codebooks, dim // heads), np.float32)
    values = np.empty((depth, rows, heads, codebooks, dim // heads), np.float32)
    x, normed = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    branch, mixed = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    packed = np.empty((rows, 3 * dim), np.float32)
    for codebook in range(codebooks):
        for row in range(rows):
            copy(x[row], inputs[row, codebook * dim :])
        add_entries(x, weights.tables, weights.starts[codebook], tokens[:, codebook])
        for index in range(depth):
            layer = codebook * depth + index
            rms_norm(x, layers.norm1[layer], normed)
            matmul(normed, layers.in_proj[layer], packed)
            depth_attend(packed, keys[index], values[index], codebook, mixed)
            matmul(mixed, layers.out_proj[layer], branch)
            add(x, branch)
            feed_forward(x, normed, branch, layers, layer)
        scores = logits[codebook % logits.shape[0]]
        matmul(x, weights.heads[codebook], scores)
        draw_rows(scores, temperature, top_k, row_keys, codebook + 1, tokens[:, codebook + 1])

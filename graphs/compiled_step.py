"""The language model on a CPU as a few compiled calls: one a temporal layer, one a codebook of the depth transformer.

A step of the demo model is some 1,500 torch operators on rows so few that calling them costs more than computing them.
Here a step is 8 + 8 calls and four more. Weights are read in bf16 or fp32, whichever the model was loaded in; all
arithmetic is fp32. Measured against the operators in docs/decisions/cpu-step.md; the frame has 80 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.attention_cpu import ColumnCache, attend, store
from graphs.compiled import as_array, compiled, exp, gate, matmul, pack, rms_norm, widen
from graphs.kv_cache import Span
from models.config import AUDIO_CODEBOOKS, LMConfig
from models.layers import Gating, Linear, rope_rotation
from models.lm import DepthLayer, LanguageModel, TemporalLayer

Array = npt.NDArray[Any]


class _LayerWeights(NamedTuple):
    """One transformer layer, as the kernels read it; for the depth transformer, of one codebook."""

    norm1: Array
    in_proj: Array
    out_proj: Array
    norm2: Array
    gate_in: Array
    gate_out: Array


@compiled
def _rotate(heads: Any, cosine: Any, sine: Any) -> None:
    """Turns the pairs (2i, 2i+1) of heads [rows, heads, head_dim] in place; cosine, sine [rows, head_dim / 2]."""
    for row in range(heads.shape[0]):
        for head in range(heads.shape[1]):
            vector = heads[row, head]
            for i in range(cosine.shape[1]):
                real, imaginary = vector[2 * i], vector[2 * i + 1]
                vector[2 * i] = real * cosine[row, i] - imaginary * sine[row, i]
                vector[2 * i + 1] = real * sine[row, i] + imaginary * cosine[row, i]


@compiled
def _feed_forward(x: Any, normed: Any, branch: Any, weights: Any) -> None:
    """x += gated feed-forward of norm2(x)."""
    rms_norm(x, weights[3], normed)
    packed = np.empty((x.shape[0], weights[4].shape[1]), np.float32)
    matmul(normed, weights[4], packed)
    hidden = np.zeros((x.shape[0], weights[5].shape[0]), np.float32)  # its last columns may be padding
    gate(packed, hidden)
    matmul(hidden, weights[5], branch)
    x += branch


@compiled
def _temporal_layer(
    x: Any, weights: Any, rotation: Any, keys: Any, values: Any, slots: Any, places: Any, seen: Any, scale: Any
) -> None:
    """One layer over x [rows, dim] in place. rotation: cosine and sine; seen: first position and count of each row."""
    rows, dim = x.shape
    heads, head_dim = keys.shape[1], keys.shape[2]
    normed, branch = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    rms_norm(x, weights[0], normed)
    packed = np.empty((rows, 3 * dim), np.float32)
    matmul(normed, weights[1], packed)
    real = slots.shape[0]  # rows beyond are padding
    split = packed.reshape(rows, 3, heads, head_dim)[:real]
    _rotate(split[:, 0], rotation[0], rotation[1])
    _rotate(split[:, 1], rotation[0], rotation[1])
    store(keys, slots, places, split[:, 1])
    store(values, slots, places, split[:, 2])
    mixed = np.zeros((rows, heads, head_dim), np.float32)
    attend(split[:, 0], keys, values, slots, seen[0], seen[1], scale, mixed)
    matmul(mixed.reshape(rows, dim), weights[2], branch)
    x += branch
    _feed_forward(x, normed, branch, weights)


@compiled
def _depth_attend(packed: Any, keys: Any, values: Any, codebook: int, mixed: Any) -> None:
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
            keys[row, head, codebook] = packed[row, dim + start : dim + start + head_dim]
            values[row, head, codebook] = packed[row, 2 * dim + start : 2 * dim + start + head_dim]
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
            out[:] = np.float32(0.0)
            for place in range(codebook + 1):
                weight = weights[place] / total
                for i in range(head_dim):
                    out[i] += weight * values[row, head, place, i]


@compiled
def _depth_layer(x: Any, weights: Any, keys: Any, values: Any, codebook: int) -> None:
    """One layer of the depth transformer over x [rows, dim] in place."""
    rows, dim = x.shape
    normed, branch = np.empty((rows, dim), np.float32), np.empty((rows, dim), np.float32)
    rms_norm(x, weights[0], normed)
    packed, mixed = np.empty((rows, 3 * dim), np.float32), np.empty((rows, dim), np.float32)
    matmul(normed, weights[1], packed)
    _depth_attend(packed, keys, values, codebook, mixed)
    matmul(mixed, weights[2], branch)
    x += branch
    _feed_forward(x, normed, branch, weights)


@compiled
def _embed(tokens: Any, starts: Any, table: Any, out: Any) -> None:
    """out [rows, dim] = the sum of the tokens' rows in the joined table; token -1 contributes nothing."""
    for row in range(tokens.shape[0]):
        target = out[row]
        target[:] = np.float32(0.0)
        for stream in range(tokens.shape[1]):
            if tokens[row, stream] >= 0:
                entry = table[starts[stream] + tokens[row, stream]]
                for i in range(entry.shape[0]):
                    target[i] += widen(entry[i])


@compiled
def _add_entries(x: Any, table: Any, tokens: Any) -> None:
    """x [rows, dim] += table[tokens]."""
    for row in range(x.shape[0]):
        entry, target = table[tokens[row]], x[row]
        for i in range(entry.shape[0]):
            target[i] += widen(entry[i])


class CompiledModel:
    """A LanguageModel's weights, packed once, and its arithmetic; state is the cache's."""

    def __init__(self, model: LanguageModel, cache: ColumnCache) -> None:
        """Holds a second, packed copy of the linear layers. Raises ValueError for dtypes other than bf16 and fp32."""
        config = self._config = model.config
        self._cache = cache
        self._table, self._starts = as_array(model.joined_table()), model.table_starts.numpy()
        self._layers = [_temporal_weights(layer) for layer in model.transformer.layers]
        self._out_norm = as_array(model.out_norm.alpha.view(-1))
        self._text_head = pack(model.text_linear.weight)
        self._depth_in = pack(torch.cat([_linear(layer) for layer in model.depformer_in]))
        self._depth_tables = [as_array(t.weight) for t in (model.depformer_text_emb, *model.depformer_emb)]
        self._depth_layers = [
            [_depth_weights(layer, codebook, config) for layer in model.depformer.layers]
            for codebook in range(AUDIO_CODEBOOKS)
        ]
        self._heads = [pack(_linear(head)) for head in model.linears]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(
        self,
        tokens: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        spans: Sequence[Span],
        overrides: Sequence[tuple[int, Tensor]],
    ) -> Tensor:
        """See graphs.step_model.StepModel."""
        config, cache = self._config, self._cache
        x = np.empty((len(tokens), config.dim), dtype=np.float32)
        _embed(tokens, self._starts, self._table, x)
        for start, embeddings in overrides:
            x[start : start + len(embeddings)] = embeddings.float().numpy()
        plan = cache.attention(spans)
        turn = rope_rotation(torch.from_numpy(positions[: plan.rows]), config.head_dim, config.max_period).squeeze(1)
        rotation = (turn.real.contiguous().numpy(), turn.imag.contiguous().numpy())
        seen = (plan.first, plan.count)
        for weights, keys, values in zip(self._layers, cache.key_arrays, cache.value_arrays, strict=True):
            _temporal_layer(x, weights, rotation, keys, values, plan.slots, plan.places, seen, plan.scale)
        normed = np.empty_like(x)
        rms_norm(x, self._out_norm, normed)
        return torch.from_numpy(normed)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, dim] → [rows, text_card] fp32."""
        return torch.from_numpy(_product(hidden.numpy(), self._text_head))

    def depth(self, hidden: Tensor) -> CompiledDepth:
        return CompiledDepth(self, _product(hidden.numpy(), self._depth_in))


class CompiledDepth:
    """One frame's walk through the agent's codebooks; see models.lm.DepthPass."""

    def __init__(self, model: CompiledModel, inputs: npt.NDArray[np.float32]) -> None:
        """inputs: [rows, 8 · depth dim], the hidden state as each codebook takes it in."""
        self._model = model
        config, rows = model._config, len(inputs)
        self._inputs = inputs.reshape(rows, AUDIO_CODEBOOKS, config.depformer_dim)
        heads = config.depformer_num_heads
        shape = (config.depformer_num_layers, rows, heads, AUDIO_CODEBOOKS, config.depformer_dim // heads)
        self._keys, self._values = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.float32)

    def logits(self, codebook: int, previous: Tensor) -> Tensor:
        """previous [rows] int64 → logits [rows, card] fp32; codebooks in turn."""
        model = self._model
        x = self._inputs[:, codebook].copy()
        _add_entries(x, model._depth_tables[codebook], previous.numpy())
        for layer, weights in enumerate(model._depth_layers[codebook]):
            _depth_layer(x, weights, self._keys[layer], self._values[layer], codebook)
        return torch.from_numpy(_product(x, model._heads[codebook]))


def _product(x: Array, weight: Array) -> npt.NDArray[np.float32]:
    out = np.empty((len(x), weight.shape[1]), dtype=np.float32)
    matmul(x, weight, out)
    return out


def _temporal_weights(layer: Any) -> _LayerWeights:
    assert isinstance(layer, TemporalLayer)
    attention = layer.self_attn
    return _layer_weights(layer, attention.in_proj_weight, attention.out_proj.weight, layer.gating)


def _depth_weights(layer: Any, codebook: int, config: LMConfig) -> _LayerWeights:
    assert isinstance(layer, DepthLayer)
    dim, attention, gating = config.depformer_dim, layer.self_attn, layer.gating[codebook]
    assert isinstance(gating, Gating)
    in_proj = attention.in_proj_weight[codebook * 3 * dim : (codebook + 1) * 3 * dim]
    return _layer_weights(layer, in_proj, attention.out_proj.weight[codebook * dim : (codebook + 1) * dim], gating)


def _linear(layer: Any) -> Tensor:
    assert isinstance(layer, Linear)
    return layer.weight


def _layer_weights(
    layer: TemporalLayer | DepthLayer, in_proj: Tensor, out_proj: Tensor, gating: Gating
) -> _LayerWeights:
    return _LayerWeights(
        norm1=as_array(layer.norm1.alpha.view(-1)),
        in_proj=pack(in_proj),
        out_proj=pack(out_proj),
        norm2=as_array(layer.norm2.alpha.view(-1)),
        gate_in=pack(gating.linear_in.weight),
        gate_out=pack(gating.linear_out.weight),
    )

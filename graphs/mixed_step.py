"""The CPU's step with the temporal transformer's products and attention behind interfaces: oneDNN's, or vLLM's.

graphs.compiled_step runs all layers in one call and is the faster one wherever its own products are. This one makes
some ten calls a layer. Between two products activations are fp32; a product that multiplies bf16 is given bf16. What
draws the tokens stays compiled: its products are so small that a call to another library costs more than it saves. The
frame has 80 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.attention_cpu import CompiledCache
from graphs.compiled import as_array, compiled, exp, narrow, rms_norm, widen
from graphs.compiled_layers import embed
from graphs.compiled_step import CompiledModel
from graphs.kv_cache import KVCache, Span
from graphs.products import Array, Product, make_product
from models.layers import rope_rotation
from models.lm import LanguageModel, TemporalLayer


@compiled
def _add(x: Any, branch: Any) -> None:
    """x [rows, dim] fp32 += branch, however that is stored."""
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[row, i] += widen(branch[row, i])


@compiled
def _copy(stored: Any, out: Any) -> None:
    """out [rows, columns of `stored`] = stored, each as it stores numbers."""
    for row in range(stored.shape[0]):
        for i in range(stored.shape[1]):
            out[row, i] = narrow(widen(stored[row, i]), out)


@compiled
def _gate(packed: Any, out: Any) -> None:
    """out [rows, hidden …] = silu(packed[:, :hidden]) · packed[:, hidden:]."""
    hidden = packed.shape[1] // 2
    for row in range(packed.shape[0]):
        for i in range(hidden):
            left, right = widen(packed[row, i]), widen(packed[row, hidden + i])
            out[row, i] = narrow(left / (np.float32(1.0) + exp(-left)) * right, out)


@compiled
def _rotate_split(packed: Any, cosine: Any, sine: Any, parts: Any) -> None:
    """parts [3, rows, heads, head_dim] fp32 = queries, keys and values of packed [rows, 3 · dim], the first two turned;
    cosine, sine [rows, head_dim / 2]."""
    _, rows, heads, head_dim = parts.shape
    dim = heads * head_dim
    for row in range(rows):
        for head in range(heads):
            for part in range(2):
                start = part * dim + head * head_dim
                for i in range(head_dim // 2):
                    real, imaginary = widen(packed[row, start + 2 * i]), widen(packed[row, start + 2 * i + 1])
                    parts[part, row, head, 2 * i] = real * cosine[row, i] - imaginary * sine[row, i]
                    parts[part, row, head, 2 * i + 1] = real * sine[row, i] + imaginary * cosine[row, i]
            start = 2 * dim + head * head_dim
            for i in range(head_dim):
                parts[2, row, head, i] = widen(packed[row, start + i])


class _Layer(NamedTuple):
    norm1: Array
    in_proj: Product
    out_proj: Product
    norm2: Array
    gate_in: Product
    gate_out: Product


class MixedModel(CompiledModel):
    """A graphs.step_model.WholeStep; `linear` names the temporal products (graphs.products), the attention is the
    cache's."""

    def __init__(self, model: LanguageModel, cache: KVCache, linear: str = "ours") -> None:
        """Raises ValueError for an unknown name or dtypes other than bf16 and fp32, ImportError without vLLM."""
        super().__init__(model, cast(CompiledCache, cache))  # which only `_hidden` uses, and that is ours
        self._rings = cache
        self._parts = [_layer(layer, linear) for layer in model.transformer.layers]
        del self._layers  # the same weights, as the compiled products read them

    def _hidden(
        self, tokens: npt.NDArray[np.int16], spans: Sequence[Span], overrides: Sequence[tuple[int, Tensor]]
    ) -> npt.NDArray[np.float32]:
        """See CompiledModel."""
        config, rows = self._config, sum(span.count for span in spans)
        x = np.empty((rows, config.dim), dtype=np.float32)
        embed(tokens[:rows], self._starts, self._table, x)
        for start, embeddings in overrides:
            x[start : start + len(embeddings)] = embeddings.float().numpy()
        attend = self._rings.attention(spans)
        position = np.concatenate([np.arange(span.first, span.first + span.count) for span in spans])
        turn = rope_rotation(torch.from_numpy(position), config.head_dim, config.max_period).squeeze(1)
        cosine, sine = turn.real.contiguous().numpy(), turn.imag.contiguous().numpy()
        parts = np.empty((3, rows, config.num_heads, config.head_dim), dtype=np.float32)
        q, k, v = (torch.from_numpy(part) for part in parts)
        for index, layer in enumerate(self._parts):
            _rotate_split(layer.in_proj(_normed(x, layer.norm1, layer.in_proj)), cosine, sine, parts)
            mixed = attend(index, q, k, v).reshape(rows, -1).numpy()
            _add(x, layer.out_proj(_given(mixed, layer.out_proj)))
            packed = layer.gate_in(_normed(x, layer.norm2, layer.gate_in))
            inner = np.zeros(
                (rows, layer.gate_out.width), dtype=layer.gate_out.words
            )  # its last columns may be padding
            _gate(packed, inner)
            _add(x, layer.gate_out(inner))
        return x


def _normed(x: Array, alpha: Array, product: Product) -> Array:
    """The norm of x as `product` takes it."""
    out = np.zeros((len(x), product.width), dtype=product.words)
    rms_norm(x, alpha, out)
    return out


def _given(x: Array, product: Product) -> Array:
    """x fp32 as `product` takes it."""
    if product.words is np.float32 and product.width == x.shape[1]:
        return x
    out = np.zeros((len(x), product.width), dtype=product.words)
    _copy(x, out)
    return out


def _layer(layer: Any, kind: str) -> _Layer:
    assert isinstance(layer, TemporalLayer)
    attention, gating = layer.self_attn, layer.gating
    return _Layer(
        norm1=as_array(layer.norm1.alpha.view(-1)),
        in_proj=make_product(kind, attention.in_proj_weight),
        out_proj=make_product(kind, attention.out_proj.weight),
        norm2=as_array(layer.norm2.alpha.view(-1)),
        gate_in=make_product(kind, gating.linear_in.weight),
        gate_out=make_product(kind, gating.linear_out.weight),
    )

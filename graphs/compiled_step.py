"""The language model on a CPU as two compiled calls a step: the temporal transformer, and what draws a frame's tokens.

A step of the demo model is some 1,500 torch operators on rows so few that calling them costs more than computing them.
Weights are read in bf16 or fp32, whichever the model was loaded in, or in int8; all arithmetic is fp32. Measured
against the operators in docs/decisions/cpu-step.md; the frame has 80 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from graphs.attention_cpu import CompiledAttention, CompiledCache
from graphs.compiled import as_array, rms_norm
from graphs.compiled import pack as packed
from graphs.compiled_layers import Array, DepthWeights, LayerWeights, answer, embed, temporal
from graphs.compiled_vectors import WIDE
from graphs.kv_cache import Span, round_up
from graphs.sampling import row_keys
from graphs.step_inputs import Draws
from models.config import AUDIO_CODEBOOKS
from models.layers import Gating, Linear, rope_rotation
from models.lm import DepthLayer, LanguageModel, TemporalLayer

Pack = Callable[[Tensor], Array]
Probe = Callable[[Tensor, Tensor], None]  # graphs.step_model's, which imports this module


class CompiledModel:
    """A LanguageModel's weights, packed once, and its arithmetic: a graphs.step_model.WholeStep."""

    def __init__(self, model: LanguageModel, cache: CompiledCache, *, small: bool = False) -> None:
        """Holds a second, packed copy of the linear layers; small: in int8, with a scale for each output.

        Raises ValueError for dtypes other than bf16 and fp32.
        """
        pack = functools.partial(packed, small=small)
        config = self._config = model.config
        self._cache = cache
        self._table, self._starts = as_array(model.joined_table()), model.table_starts.numpy()
        self._layers = _stacked([_temporal_weights(layer, pack) for layer in model.transformer.layers])
        self._out_norm = as_array(model.out_norm.alpha.view(-1))
        self._depth_layers = _stacked(
            [
                _depth_weights(layer, codebook, config.depformer_dim, pack)
                for codebook in range(AUDIO_CODEBOOKS)
                for layer in model.depformer.layers
            ]
        )
        tables = [table.weight for table in (model.depformer_text_emb, *model.depformer_emb)][:AUDIO_CODEBOOKS]
        self._depth = DepthWeights(
            text_head=pack(model.text_linear.weight),
            inputs=pack(torch.cat([_linear(layer) for layer in model.depformer_in])),
            tables=as_array(torch.cat(tables)),
            starts=np.cumsum([0, *(len(table) for table in tables[:-1])]),
            heads=np.stack([pack(_linear(head)) for head in model.linears]),
        )

    def frame(
        self,
        tokens: npt.NDArray[np.int16],
        spans: Sequence[Span],
        draws: Draws,
        overrides: Sequence[tuple[int, Tensor]],
        probe: Probe | None,
    ) -> npt.NDArray[np.int16]:
        """See graphs.step_model.WholeStep."""
        x = self._hidden(tokens, spans, overrides)
        count, config = len(draws.rows), self._config
        if not count:
            return np.zeros((0, 1 + AUDIO_CODEBOOKS), dtype=np.int16)
        chosen = x[draws.rows]
        normed = np.empty_like(chosen)
        rms_norm(chosen, self._out_norm, normed)
        drawn = draws.given.copy()
        text_logits = np.empty((count, config.text_card), dtype=np.float32)
        logits = np.empty((1 if probe is None else AUDIO_CODEBOOKS, count, config.card), dtype=np.float32)
        rows = draws.sampling
        sampling = (rows.text_temperature, rows.text_top_k, rows.audio_temperature, rows.audio_top_k, row_keys(rows))
        answer(
            normed,
            self._depth,
            self._depth_layers,
            config.depformer_num_heads,
            sampling,
            drawn,
            text_logits,
            logits,
        )
        if probe is not None:
            probe(torch.from_numpy(text_logits), torch.from_numpy(logits).transpose(0, 1))
        return drawn.astype(np.int16)

    def _hidden(
        self, tokens: npt.NDArray[np.int16], spans: Sequence[Span], overrides: Sequence[tuple[int, Tensor]]
    ) -> npt.NDArray[np.float32]:
        """Input columns tokens [rows, 17] → the temporal transformer's output [rows, dim], before its last norm."""
        config, cache = self._config, self._cache
        plan = CompiledAttention(cache, spans)
        x = np.empty((plan.rows, config.dim), dtype=np.float32)
        embed(tokens[: plan.rows], self._starts, self._table, x)
        for start, embeddings in overrides:
            x[start : start + len(embeddings)] = embeddings.float().numpy()
        turn = rope_rotation(torch.from_numpy(plan.position), config.head_dim, config.max_period).squeeze(1)
        rotation = (turn.real.contiguous().numpy(), turn.imag.contiguous().numpy())
        rows = (plan.slots, plan.places, plan.first, plan.count)
        rings = (cache.key_arrays, cache.value_arrays, cache.block_starts, cache.head_hop)
        temporal(x, self._layers, rotation, *rings, rows, plan.scale)
        return x


def _linear(layer: Any) -> Tensor:
    assert isinstance(layer, Linear)
    return layer.weight


def _stacked(layers: Sequence[LayerWeights]) -> LayerWeights:
    return LayerWeights(*(np.stack(kind) for kind in zip(*layers, strict=True)))


def _temporal_weights(layer: Any, pack: Pack) -> LayerWeights:
    assert isinstance(layer, TemporalLayer)
    attention = layer.self_attn
    return _layer_weights(layer, attention.in_proj_weight, attention.out_proj.weight, layer.gating, pack)


def _depth_weights(layer: Any, codebook: int, dim: int, pack: Pack) -> LayerWeights:
    assert isinstance(layer, DepthLayer)
    attention, gating = layer.self_attn, layer.gating[codebook]
    assert isinstance(gating, Gating)
    in_proj = attention.in_proj_weight[codebook * 3 * dim : (codebook + 1) * 3 * dim]
    return _layer_weights(
        layer, in_proj, attention.out_proj.weight[codebook * dim : (codebook + 1) * dim], gating, pack
    )


def _layer_weights(
    layer: TemporalLayer | DepthLayer, in_proj: Tensor, out_proj: Tensor, gating: Gating, pack: Pack
) -> LayerWeights:
    # Both halves of a gate are filled up to whole panels, so that the second half begins with one.
    hidden = gating.linear_out.weight.shape[1]
    padding = round_up(hidden, WIDE) - hidden
    halves = gating.linear_in.weight.view(2, hidden, -1)
    return LayerWeights(
        norm1=_norm(layer.norm1.alpha),
        in_proj=pack(in_proj),
        out_proj=pack(out_proj),
        norm2=_norm(layer.norm2.alpha),
        gate_in=pack(pad(halves, (0, 0, 0, padding)).flatten(0, 1)),
        gate_out=pack(pad(gating.linear_out.weight, (0, padding))),
    )


def _norm(alpha: Tensor) -> Array:
    return as_array(alpha.view(-1))

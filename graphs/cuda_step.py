"""The whole frame step in fixed shapes: one copy in, one CUDA graph, one copy out.

embed → 32 layers → text token → eight codebooks → 9 tokens a slot, with nothing in between that asks the host. A graph
exists for each set of shapes (the live slots alone; beside a prompt's tile; a prompt's tile nobody draws from) and is
captured when it is first needed. Without capture, on a CPU say, the same operations run one after the other.

The published step is some 4,000 kernel launches, 3,072 of them in the depth transformer; this one is some 500, because
norms, gates, residuals and the look-up of the drawn token are part of the products and draws that they surround. All of
it has to fit into a frame's 80 ms with the codec; docs/decisions/cuda-step.md counts what it should take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from graphs.kv_cache import Span
from graphs.ring_cache import RingCache
from graphs.step_inputs import POSITION, QUERY_ROWS, SOURCE, Draws, Shape, StepInputs, blocks_of
from graphs.step_ops import StepOps, TorchOps, Turn
from models.config import AUDIO_CODEBOOKS
from models.layers import Gating, Linear, rope_rotation
from models.lm import DepthLayer, LanguageModel, TemporalLayer

log = logging.getLogger(__name__)

GENERATED = 1 + AUDIO_CODEBOOKS
ROW_STEP = 4  # of the smallest step's rows: torch's products on a CPU give a row other bits for one to three

LogitsProbe = Callable[[Tensor, Tensor], None]


class _Layer(NamedTuple):
    """One transformer layer; for the depth transformer, of one codebook."""

    norm1: Tensor
    in_proj: Tensor
    out_proj: Tensor
    norm2: Tensor
    gate_in: Tensor
    gate_out: Tensor


class StaticStep:
    """A LanguageModel over a RingCache as one call with arrays in and tokens out."""

    def __init__(
        self, model: LanguageModel, cache: RingCache, ops: StepOps | None = None, *, capture: bool | None = None
    ) -> None:
        """ops: Triton's where the model is on CUDA, torch's elsewhere; a test or a benchmark brings its own.

        capture: whether to record CUDA graphs; by default on CUDA. Torch's operations cannot be recorded.
        """
        config, device = model.config, model.device
        self._config, self._cache = config, cache
        self._ops = ops if ops is not None else default_ops(model, cache)
        self._capture = device.type == "cuda" if capture is None else capture
        self._table, self._starts = model.joined_table(), model.table_starts.to(device)
        self._layers = [_temporal_layer(layer) for layer in model.transformer.layers]
        self._out_norm = model.out_norm.alpha.detach().view(-1)
        self._text_head = model.text_linear.weight.detach()
        self._depth_in = _join(model.depformer_in)
        self._depth_tables = [t.weight.detach() for t in (model.depformer_text_emb, *model.depformer_emb)]
        self._depth_layers = [
            [_depth_layer(layer, codebook, config.depformer_dim) for layer in model.depformer.layers]
            for codebook in range(AUDIO_CODEBOOKS)
        ]
        self._heads = [_weight(head) for head in model.linears]

        slots, rows = cache.slots, _up(cache.slots + cache.tile, ROW_STEP)
        self._largest = Shape(rows, slots + -(-cache.tile // QUERY_ROWS), _up(slots, ROW_STEP))
        self._shapes = (
            Shape(_up(slots, ROW_STEP), slots, self._largest.draws),
            Shape(rows, self._largest.blocks, 0),
            self._largest,
        )
        self._inputs = StepInputs(self._largest, device)
        draws = self._largest.draws
        self._tokens = torch.zeros(draws, GENERATED, dtype=torch.int32, device=device)
        self._tokens_host = torch.zeros(draws, GENERATED, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._text_logits = torch.zeros(draws, config.text_card, device=device)
        self._audio_logits = torch.zeros(draws, AUDIO_CODEBOOKS, config.card, device=device)
        self._given = torch.zeros(rows, config.dim, device=device, dtype=model.dtype)
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}

    @property
    def device(self) -> torch.device:
        return self._table.device

    def frame(
        self,
        tokens: npt.NDArray[np.int16],
        spans: Sequence[Span],
        draws: Draws,
        overrides: Sequence[tuple[int, Tensor]],
        probe: LogitsProbe | None,
    ) -> npt.NDArray[np.int16]:
        """tokens [rows, 17] → [draws, 9]. Each override replaces the embeddings of rows start … by its own [n, dim].

        Raises ValueError for more rows than slots and tile together, or more draws than slots.
        """
        shape = self._shape(len(tokens), blocks_of(spans), len(draws.rows))
        for start, embeddings in overrides:
            self._given[start : start + len(embeddings)].copy_(embeddings)
        self._inputs.fill(shape, tokens, spans, draws, [(start, len(given)) for start, given in overrides])
        if not self._capture:
            self._run(shape)
        else:
            if shape not in self._graphs:
                self._graphs[shape] = self._captured(shape)
            self._graphs[shape].replay()
        count = len(draws.rows)
        self._tokens_host.copy_(self._tokens, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the one wait of a frame; frees the inputs, too
        if probe is not None and count:
            probe(self._text_logits[:count].clone(), self._audio_logits[:count].clone())
        return self._tokens_host[:count].numpy().astype(np.int16)

    def _shape(self, rows: int, blocks: int, draws: int) -> Shape:
        for shape in self._shapes:
            if rows <= shape.rows and blocks <= shape.blocks and draws <= shape.draws:
                return shape
        largest = self._largest
        raise ValueError(
            f"a step takes {largest.rows} rows in {largest.blocks} blocks and {largest.draws} draws, "
            f"not {rows}, {blocks} and {draws}: feed a prompt in tiles of {self._cache.tile}"
        )

    def _captured(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """Runs the step twice so that every kernel is compiled, then once more to record it.

        The runs are of the very step asked for: it writes the same keys and draws the same tokens each time.
        """
        log.info("capturing the frame step: %d rows, %d draws", shape.rows, shape.draws)
        side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's own omission
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(shape)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # A pool of its own for each: shared pools are safe only for graphs that replay in the order of their capture.
        with torch.cuda.graph(graph):
            self._run(shape)
        return graph

    def _run(self, shape: Shape) -> None:
        """The step over what stands in the input buffer."""
        rows, blocks, asked = self._inputs.views(shape)
        x = self._temporal(rows, blocks)
        if shape.draws:
            self._draw(self._ops.norm_of(x, self._out_norm, asked[:, SOURCE]), asked)

    def _temporal(self, rows: Tensor, blocks: Tensor) -> Tensor:
        ops = self._ops
        x = ops.embed(rows, self._table, self._starts, self._given[: len(rows)])
        turn = self._turn(rows[:, POSITION])
        for index, layer in enumerate(self._layers):
            packed = ops.linear(x, layer.in_proj, alpha=layer.norm1)
            mixed = ops.attend(index, packed, rows, blocks, turn)
            x = _feed_forward(ops, ops.linear(mixed, layer.out_proj, residual=x), layer)
        return x

    def _turn(self, positions: Tensor) -> Turn:
        rotation = rope_rotation(positions, self._config.head_dim, self._config.max_period).squeeze(1)
        return rotation.real.contiguous(), rotation.imag.contiguous()

    def _draw(self, hidden: Tensor, asked: Tensor) -> None:
        """Text, then the codebooks in turn: each starts from the hidden state and the token before it."""
        ops, tokens, dim = self._ops, self._tokens, self._config.depformer_dim
        ops.linear(hidden, self._text_head, out=self._text_logits)
        inputs = ops.linear(hidden, self._depth_in)  # [draws, 8 · dim]
        shape = (len(self._depth_layers[0]), AUDIO_CODEBOOKS, len(hidden), 3 * dim)
        packed = hidden.new_empty(shape)  # read up to the codebook at hand
        x = ops.draw(self._text_logits, asked, 0, tokens, (inputs[:, :dim], self._depth_tables[0]))
        for codebook in range(AUDIO_CODEBOOKS):
            for index, layer in enumerate(self._depth_layers[codebook]):
                ops.linear(x, layer.in_proj, alpha=layer.norm1, out=packed[index, codebook])
                mixed = ops.depth_attend(packed[index], codebook, self._config.depformer_num_heads)
                x = _feed_forward(ops, ops.linear(mixed, layer.out_proj, residual=x), layer)
            logits = ops.linear(x, self._heads[codebook], out=self._audio_logits[:, codebook])
            following = None
            if codebook + 1 < AUDIO_CODEBOOKS:
                start = (codebook + 1) * dim
                following = (inputs[:, start : start + dim], self._depth_tables[codebook + 1])
            x = ops.draw(logits, asked, codebook + 1, tokens, following)


def default_ops(model: LanguageModel, cache: RingCache) -> StepOps:
    """Triton's kernels on CUDA, torch's operators elsewhere."""
    if model.device.type != "cuda":
        return TorchOps(cache, model.config.num_heads)
    from graphs.triton_ops import TritonOps  # triton is absent from CPU installations

    return TritonOps(cache, model.config.num_heads, model.config.head_dim)


def _feed_forward(ops: StepOps, x: Tensor, layer: _Layer) -> Tensor:
    return ops.linear(ops.linear(x, layer.gate_in, alpha=layer.norm2, gated=True), layer.gate_out, residual=x)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, Linear)
    return layer.weight.detach()


def _join(layers: nn.ModuleList) -> Tensor:
    """One weight [sum of outputs, inputs] of several layers with the same input, which become views of it."""
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    outputs, inputs = sum(layer.weight.shape[0] for layer in linears), linears[0].weight.shape[1]
    first, last = linears[0].weight.detach(), linears[-1].weight.detach()
    apart = last.data_ptr() - first.data_ptr()
    together = first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    if together and apart == (outputs - last.shape[0]) * inputs * first.element_size():
        return first.as_strided((outputs, inputs), (inputs, 1))  # joined before, by another step of this model
    joined = torch.cat([layer.weight.detach() for layer in linears])
    start = 0
    for layer in linears:
        stop = start + layer.weight.shape[0]
        layer.weight.data = joined[start:stop]
        start = stop
    return joined


def _temporal_layer(layer: nn.Module) -> _Layer:
    assert isinstance(layer, TemporalLayer)
    attention = layer.self_attn
    return _layer(layer, attention.in_proj_weight, attention.out_proj.weight, layer.gating)


def _depth_layer(layer: nn.Module, codebook: int, dim: int) -> _Layer:
    assert isinstance(layer, DepthLayer)
    attention, gating = layer.self_attn, layer.gating[codebook]
    assert isinstance(gating, Gating)
    in_proj = attention.in_proj_weight[codebook * 3 * dim : (codebook + 1) * 3 * dim]
    return _layer(layer, in_proj, attention.out_proj.weight[codebook * dim : (codebook + 1) * dim], gating)


def _layer(layer: TemporalLayer | DepthLayer, in_proj: Tensor, out_proj: Tensor, gating: Gating) -> _Layer:
    return _Layer(
        norm1=layer.norm1.alpha.detach().view(-1),
        in_proj=in_proj.detach(),
        out_proj=out_proj.detach(),
        norm2=layer.norm2.alpha.detach().view(-1),
        gate_in=gating.linear_in.weight.detach(),
        gate_out=gating.linear_out.weight.detach(),
    )

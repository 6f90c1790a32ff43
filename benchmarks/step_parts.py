"""Where a captured frame step spends its time: its products, its attention, its draws, each beside its own roofline.

    python -m benchmarks.step_parts --shape 7b --slots 32 --device cuda

Every part is a CUDA graph of its own over all layers, so that weights and keys come from memory and not from a cache.
Products are timed by our kernel and by torch's: which of the two is faster at few rows is a matter of measurement.
On a CPU the parts run in torch operators, which only tries the script.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.frame import KV_BACKENDS, key_bytes, step_bytes
from benchmarks.setting import options, random_lm, setting
from benchmarks.timing import copy_bandwidth, median_ms
from graphs.backends import default_dtype, make_cache
from graphs.cuda_step import StaticStep, default_ops
from graphs.frame_step import GENERATED, Emit, draws_of
from graphs.kv_cache import Span
from graphs.ring_cache import RingCache
from graphs.slot_engine import DEFAULT_TILE
from graphs.stages import Sampling
from graphs.step_inputs import POSITION, SOURCE
from graphs.step_ops import StepOps
from models.config import STREAMS, UNGENERATED
from models.lm import LanguageModel

Call = Callable[[], object]


def recorded(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own omission
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Parts:
    """One step of a model whose slots all hold `context` frames, told once and run in parts."""

    def __init__(self, model: LanguageModel, cache: RingCache, context: int, ops: StepOps) -> None:
        self.step = step = StaticStep(model, cache, ops, capture=False)
        self._ops = ops
        slots = cache.slots
        free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
        tokens = np.ones((slots, STREAMS), dtype=np.int16)
        spans = [Span(slot, 1, slot, context - 1) for slot in range(slots)]
        draws = draws_of([Emit(slot, context, free, Sampling(), slot) for slot in range(slots)])
        self._shape = step._shapes[0]
        step._inputs.fill(self._shape, tokens, spans, draws, [])
        self._rows, self._blocks, self._asked = step._inputs.views(self._shape)
        config = model.config
        self._x = torch.randn(self._shape.rows, config.dim, device=model.device).to(model.dtype)
        self._packed = torch.randn(self._shape.rows, 3 * config.dim, device=model.device).to(model.dtype)

    def products(self) -> None:
        """The four products of every temporal layer."""
        ops, x = self._ops, self._x
        for layer in self.step._layers:
            ops.linear(x, layer.in_proj, alpha=layer.norm1)
            mixed = ops.linear(x, layer.out_proj, residual=x)
            ops.linear(ops.linear(mixed, layer.gate_in, alpha=layer.norm2, gated=True), layer.gate_out, residual=x)

    def attention(self) -> None:
        turn = self.step._turn(self._rows[:, POSITION])
        for index in range(len(self.step._layers)):
            self._ops.attend(index, self._packed, self._rows, self._blocks, turn)

    def draws(self) -> None:
        """Text head, eight depth steps, nine draws."""
        self.step._draw(self._ops.norm_of(self._x, self.step._out_norm, self._asked[:, SOURCE]), self._asked)

    def whole(self) -> None:
        self.step._run(self._shape)


@dataclass(frozen=True)
class PartRow:
    """One part of the step, in milliseconds, beside the least that its bytes allow."""

    slots: int
    kv: str
    kind: str  # whose products
    part: str
    ms: float
    least_ms: float


def measure(model: LanguageModel, cache: RingCache, context: int, bandwidth: float) -> Iterator[PartRow]:
    """A row for each part as it is measured; bandwidth in bytes a second."""
    device, config, item = model.device, model.config, model.text_linear.weight.element_size()
    layers = sum(parameter.numel() for parameter in model.transformer.parameters()) * item
    everything = step_bytes(model, cache.slots, context, key_bytes(cache))
    keys = everything - step_bytes(model, 0, context)
    bytes_of = {"products": layers, "attention": keys, "draws": everything - keys - layers, "whole": everything}
    kinds = {"ours": default_ops(model, cache)}
    if device.type == "cuda":
        from graphs.triton_ops import MixedOps  # triton is absent from CPU installations

        kinds["products by torch"] = MixedOps(cache, config.num_heads, config.head_dim)
    kv = str(cache.keys.dtype).removeprefix("torch.")
    for kind, ops in kinds.items():
        parts = Parts(model, cache, context, ops)
        for name, needed in bytes_of.items():
            taken = median_ms(recorded(getattr(parts, name), device), device)
            yield PartRow(cache.slots, kv, kind, name, taken, needed / bandwidth * 1e3)


def line(row: PartRow) -> str:
    ratio = f"ratio {row.ms / row.least_ms:5.2f}"
    return f"{row.kind:18s} {row.part:10s} {row.ms:7.2f} ms, least {row.least_ms:6.2f}, {ratio}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("step_parts", __doc__, shape="7b")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, help="frames held; default: a full window")
    parser.add_argument("--kv", choices=KV_BACKENDS, default="model", help="keys and values as computed, or in fp8")
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    device, lm = chosen.device, chosen.lm
    model, bandwidth = random_lm(lm, device, default_dtype(device)), copy_bandwidth(device)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    backend = "static-fp8" if arguments.kv == "fp8" else "static"
    with torch.inference_mode():
        for slots in arguments.slots:
            cache = make_cache(lm, slots, DEFAULT_TILE, device=device, dtype=model.dtype, backend=backend)
            assert isinstance(cache, RingCache)
            print(f"{slots} slots, keys and values in {cache.keys.dtype}")
            for row in measure(model, cache, arguments.context or lm.window, bandwidth):
                print(line(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What torch.compile makes of the step's products: all temporal layers without attention, in operators, compiled, ours.

    python -m benchmarks.torch_compile --shape demo

Norms, the four products of each layer, gates and residuals, shapes fixed, turn by turn on one thread. Needs numba, and
a C++ compiler for torch's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.setting import options, random_lm, setting
from graphs.compiled import gate, rms_norm
from graphs.products import Array, CompiledProduct
from models.lm import LanguageModel, TemporalLayer

ROUNDS, WARM_UP = 60, 5


def layers_of(model: LanguageModel) -> list[TemporalLayer]:
    return [layer for layer in model.transformer.layers if isinstance(layer, TemporalLayer)]


def in_operators(model: LanguageModel) -> Callable[[Tensor], Tensor]:
    layers, dim = layers_of(model), model.config.dim

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            packed = F.linear(layer.norm1(x), layer.self_attn.in_proj_weight)
            x = x + layer.self_attn.out_proj(packed[:, :dim])
            x = x + layer.gating(layer.norm2(x))
        return x

    return run


def in_ours(model: LanguageModel) -> Callable[[Array], Array]:
    """The same by graphs.compiled, a call a product."""
    dim = model.config.dim
    parts = []
    for layer in layers_of(model):
        attention, gating = layer.self_attn, layer.gating
        weights = (attention.in_proj_weight, attention.out_proj.weight, gating.linear_in.weight)
        norms = [norm.alpha.detach().float().view(-1).numpy() for norm in (layer.norm1, layer.norm2)]
        products = [CompiledProduct(weight) for weight in (*weights, gating.linear_out.weight)]
        parts.append((norms, products))

    def run(x: Array) -> Array:
        normed = np.empty_like(x)
        for (norm1, norm2), (in_proj, out_proj, gate_in, gate_out) in parts:
            rms_norm(x, norm1, normed)
            x = x + out_proj(np.ascontiguousarray(in_proj(normed)[:, :dim]))
            rms_norm(x, norm2, normed)
            inner = np.empty((len(x), gate_out.width), dtype=np.float32)
            gate(gate_in(normed), inner)
            x = x + gate_out(inner)
        return x

    return run


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("torch_compile", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    for dtype in (torch.float32, torch.bfloat16):
        model = random_lm(chosen.lm, torch.device("cpu"), dtype)
        ours = in_ours(model)
        for rows in arguments.rows:
            torch.compiler.reset()  # a graph for each shape, and no limit on how many
            operators = in_operators(model)
            compiled = torch.compile(operators, dynamic=False)
            x = torch.randn(rows, chosen.lm.dim, dtype=dtype)
            plain: Array = x.float().numpy()
            calls: dict[str, Callable[[], object]] = {
                "operators": lambda run=operators, x=x: run(x),  # type: ignore[misc]  # bound at once
                "torch.compile": lambda run=compiled, x=x: run(x),  # type: ignore[misc]
                "ours": lambda run=ours, x=plain: run(x),  # type: ignore[misc]
            }
            print(f"{str(dtype)[6:]:9s} {rows:3d} rows: {turn_by_turn(calls)}", flush=True)
    return 0


@torch.inference_mode()
def turn_by_turn(calls: dict[str, Callable[[], object]]) -> str:
    """Medians in milliseconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return "  ".join(f"{name} {statistics.median(times):6.2f} ms" for name, times in taken.items())


if __name__ == "__main__":
    sys.exit(main())

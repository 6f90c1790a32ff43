"""The CPU's frame step with our kernels and with others', turn by turn in one process: what pays, and what does not.

    python -m benchmarks.backends --slots 1 4 16 --context 187 749
    .venv-vllm/bin/python -m benchmarks.backends          # with vLLM's kernels beside

Torch and numba; vLLM where it is installed. Random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.frame import measure_step
from benchmarks.setting import random_lm, shapes_of
from graphs.backends import Backends, default_dtype, make_cache
from graphs.frame_step import FrameStep
from graphs.self_test import settle
from graphs.slot_engine import DEFAULT_TILE
from graphs.spans import Span
from graphs.vllm_cpu import available
from models.lm import LanguageModel

CPU = torch.device("cpu")
LEAST_OVERCOMMIT = 1.0 + 1e-9  # pages, and enough of them for all
ROUNDS = 3  # of all candidates in turn, so that a busy minute hits each of them
Candidate = tuple[str, str]  # attention, linear
IN_PAGES = "pages"  # our attention over rings made of pages


def candidates() -> list[Candidate]:
    """What this machine can run."""
    kinds = [("ours", "ours"), (IN_PAGES, "ours"), ("ours", "int8"), ("ours", "onednn")]
    if available():
        kinds += [("ours", "vllm"), ("ours", "vllm-int8"), ("vllm", "ours"), ("vllm", "vllm")]
    return kinds


def measure(model: LanguageModel, slots: int, contexts: Sequence[int], kinds: Sequence[Candidate]) -> None:
    """Prints a line for each candidate: ms of a step at each context, and beside a prompt's tile at the last."""
    steps: dict[Candidate, FrameStep] = {}
    for attention, linear in kinds:
        paged = attention == IN_PAGES
        chosen = Backends(
            step="compiled",
            attention="ours" if paged else attention,
            linear=linear,
            kv_overcommit=LEAST_OVERCOMMIT if paged else 1.0,
        )
        cache = make_cache(model.config, slots + 1, DEFAULT_TILE, device=CPU, dtype=model.dtype, backend=chosen)
        for slot in range(slots + 1):  # as if it had been filled: a page that is not there is not to be read
            cache.cover([Span(0, cache.window + DEFAULT_TILE, slot, 0)])
        steps[attention, linear] = FrameStep(model, cache, backends=chosen)
    columns: list[Callable[[FrameStep], float]] = [
        *(lambda step, held=held: measure_step(step, model, slots, held) for held in contexts),
        lambda step: measure_step(step, model, slots, contexts[-1], DEFAULT_TILE),
    ]
    taken: dict[Candidate, list[list[float]]] = {kind: [[] for _ in columns] for kind in kinds}
    for _ in range(ROUNDS):
        for i, column in enumerate(columns):
            for kind, step in steps.items():
                taken[kind][i].append(column(step))
    base = [statistics.median(times) for times in taken[kinds[0]]]
    for kind in kinds:
        medians = [statistics.median(times) for times in taken[kind]]
        cells = "  ".join(f"{ms:7.2f} ({first / ms:4.2f} ×)" for ms, first in zip(medians, base, strict=True))
        print(f"{slots:3d} slots  attention {kind[0]:5s} products {kind[1]:9s}  {cells}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="demo", help="demo, or a checkpoint's folder")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, nargs="+", help="frames held; default: a quarter and all of the window")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    lm = shapes_of(arguments.shape)[0]
    contexts = arguments.context or [lm.window // 4, lm.window]
    model = random_lm(lm, CPU, default_dtype(CPU))
    print(f"ms of a step (times faster than ours) at {contexts} frames held, then at the last beside a prompt's tile")
    for slots in arguments.slots:
        measure(model, slots, contexts, candidates())
        picked = settle(Backends(attention="auto", linear="auto"), model, slots, DEFAULT_TILE)
        print(
            f"{slots:3d} slots  the self-test picks attention {picked.attention}, products {picked.linear}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

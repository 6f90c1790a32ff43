"""Milliseconds of one 80 ms frame: encode, frame step, decode, beside the least that memory allows.

    python -m benchmarks.frame --shape demo --slots 1 4 16
    python -m benchmarks.frame --shape 7b --slots 1 8 16 32 --device cuda --json --plot frame.png

Encode, step and decode make a frame. Prefill is a step, too: that of all slots but one, beside a whole tile of the last
one's prompt. The roofline is the bytes that the step has to read over the bandwidth that a copy reaches on this device.
Torch alone: no Ray, no checkpoint; weights are random, since time does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frame_plot import plot
from benchmarks.setting import device_name, options, random_lm, random_mimi, setting
from benchmarks.timing import copy_bandwidth, median_ms
from graphs.backends import Backends, default_dtype, make_cache
from graphs.codec import DecoderLane, EncoderLane
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import KVCache, Span
from graphs.slot_engine import DEFAULT_TILE
from graphs.stages import Sampling
from models.config import AUDIO_CODEBOOKS, FRAME_MS, FRAME_SAMPLES, STREAMS, UNGENERATED, LMConfig, MimiConfig
from models.lm import LanguageModel
from models.mimi import Mimi

KV_BACKENDS = {"model": "auto", "fp8": "static-fp8"}
LINEARS = ("ours", "int8")  # of graphs.backends.LINEARS those that are ours


def backends_of(kv: str, linear: str) -> Backends:
    """What --kv and --linear of a command line mean."""
    return Backends(step=KV_BACKENDS[kv], linear=linear)


def choices(parser: argparse.ArgumentParser) -> None:
    """Adds --kv and --linear."""
    parser.add_argument("--kv", choices=KV_BACKENDS, default="model", help="keys and values as computed, or in fp8")
    parser.add_argument("--linear", choices=LINEARS, default="ours", help="weights as loaded, or in int8 (on a CPU)")


@dataclass(frozen=True)
class FrameRow:
    """One measurement; all times are medians in milliseconds. The three parts together have 80."""

    slots: int
    context_frames: int
    encode_ms: float
    step_ms: float
    decode_ms: float
    roofline_ms: float  # of the step: bytes it has to read over the copy bandwidth of this device
    step_bytes: int
    bandwidth_gb_s: float
    device: str
    dtype: str
    threads: int
    kv: str = ""  # the dtype of keys and values
    linear: str = "ours"  # see graphs.backends
    prefill_ms: float = 0.0  # the step of all but one slot beside a whole tile of the last one's prompt

    @property
    def frame_ms(self) -> float:
        return self.encode_ms + self.step_ms + self.decode_ms

    @property
    def ratio(self) -> float:
        """How many times the step takes what reading its bytes would."""
        return self.step_ms / self.roofline_ms

    @property
    def real_time(self) -> bool:
        return self.frame_ms <= FRAME_MS

    def as_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        return {**dataclasses.asdict(self), "frame_ms": round(self.frame_ms, 3), "ratio": round(self.ratio, 2)}


def step_bytes(
    model: LanguageModel,
    slots: int,
    context_frames: int,
    key_bytes: float | None = None,
    weight_bytes: int | None = None,
) -> int:
    """What a step cannot avoid to read: every weight but the tables it looks single rows up in, and the keys seen.

    key_bytes, weight_bytes: of each stored number, a key's share of its scale included; None: the model's own.
    """
    weights = sum(
        parameter.numel() * (weight_bytes or parameter.element_size())
        for name, parameter in model.named_parameters()
        if "emb" not in name.split(".")[0]
    )
    config = model.config
    keys = 2 * config.num_layers * config.dim * min(context_frames, config.window)
    size = model.text_linear.weight.element_size() if key_bytes is None else key_bytes
    return weights + int(slots * keys * size)


def key_bytes(cache: KVCache) -> float:
    """Of each number in a cache, its share of a scale included."""
    return cache.bytes_per_slot / (2 * cache.keys[:, 0].numel())


def measure_step(step: FrameStep, model: LanguageModel, slots: int, context_frames: int, prefill: int = 0) -> float:
    """Milliseconds for `slots` to advance by a frame when each already holds `context_frames`.

    prefill: rows of a prompt in the slot behind them, which holds as many already.
    """
    rows = slots + prefill
    tokens = np.random.default_rng(0).integers(0, model.config.text_card, (rows, STREAMS)).astype(np.int16)
    tokens[:, 1:] %= model.config.card
    position = context_frames - 1
    free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
    spans = [Span(slot, 1, slot, position) for slot in range(slots)]
    if prefill:
        spans.append(Span(slots, prefill, slots, context_frames))
    emits = [Emit(slot, position + 1, free, Sampling(), seed=slot) for slot in range(slots)]
    return median_ms(lambda: step.run(tokens, spans, emits), model.device)


def measure_codec(mimi: Mimi, slots: int, device: torch.device, runner: str = "auto") -> tuple[float, float]:
    """Milliseconds to encode and to decode one frame of `slots` conversations; runner: see graphs.codec."""
    noise = np.random.default_rng(0)
    pcm = noise.integers(-8_000, 8_000, (slots, FRAME_SAMPLES)).astype(np.int16)
    codes = noise.integers(0, mimi.config.quantizer.bins, (slots, AUDIO_CODEBOOKS)).astype(np.int16)
    everyone = list(range(slots))
    encoder, decoder = EncoderLane(mimi, slots, runner=runner), DecoderLane(mimi, slots, runner=runner)
    return (
        median_ms(lambda: encoder.run(everyone, pcm), device),
        median_ms(lambda: decoder.run(everyone, codes), device),
    )


class FrameBench:
    """One model and one codec of random weights on one device, measured at several fills."""

    def __init__(self, lm: LMConfig, mimi: MimiConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.bandwidth = copy_bandwidth(device)  # bytes/s
        self._model = random_lm(lm, device, dtype)
        self._codec = random_mimi(mimi, device)

    def measure(
        self, slots: int, contexts: Sequence[int], backend: str | Backends = "auto", runner: str = "auto"
    ) -> Iterator[FrameRow]:
        """A row for each of `contexts` as it is measured. Full contexts are reserved, as in service.

        backend, runner: see graphs.backends and graphs.codec. Raises torch.OutOfMemoryError if the device cannot hold
        so many slots.
        """
        model, dtype = self._model, self._model.dtype
        encode_ms, decode_ms = measure_codec(self._codec, slots, self.device, runner)
        cache = make_cache(model.config, slots, DEFAULT_TILE, device=self.device, dtype=dtype, backend=backend)
        fixed = self.device.type == "cuda"
        chosen = Backends(step=backend) if isinstance(backend, str) else backend
        rows, emits = (slots + DEFAULT_TILE, slots) if fixed else (0, 0)
        step = FrameStep(model, cache, fixed_rows=rows, fixed_emits=emits, backends=chosen)
        for context in contexts:
            needed = step_bytes(model, slots, context, key_bytes(cache), 1 if chosen.linear == "int8" else None)
            yield FrameRow(
                slots=slots,
                context_frames=context,
                encode_ms=round(encode_ms, 3),
                step_ms=round(measure_step(step, model, slots, context), 3),
                prefill_ms=round(measure_step(step, model, slots - 1, context, DEFAULT_TILE), 3),
                decode_ms=round(decode_ms, 3),
                roofline_ms=round(needed / self.bandwidth * 1e3, 3),
                step_bytes=needed,
                bandwidth_gb_s=round(self.bandwidth / 1e9, 1),
                device=device_name(self.device),
                dtype=str(dtype).removeprefix("torch."),
                threads=torch.get_num_threads(),
                kv=str(cache.keys.dtype).removeprefix("torch."),
                linear=chosen.linear,
            )


def default_contexts(lm: LMConfig) -> list[int]:
    """A call that has just begun, one half full, one whose window slides."""
    return [max(1, lm.window // 10), max(1, lm.window // 2), lm.window]


def line(row: FrameRow) -> str:
    return (
        f"{row.slots:3d} slots, {row.context_frames:4d} frames held: encode {row.encode_ms:7.2f}  "
        f"prefill {row.prefill_ms:7.2f}  step {row.step_ms:7.2f} = {row.ratio:4.1f} x roofline {row.roofline_ms:6.2f}  "
        f"decode {row.decode_ms:7.2f}  "
        f"together {row.frame_ms:7.2f} of 80 ms"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("frame", __doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--context", type=int, nargs="+", help="frames held already; default: 10, 50, 100 %% of the window"
    )
    choices(parser)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture here")
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    bench = FrameBench(chosen.lm, chosen.mimi, chosen.device, default_dtype(chosen.device))
    rows: list[FrameRow] = []
    for slots in arguments.slots:
        contexts = arguments.context or default_contexts(chosen.lm)
        for row in bench.measure(slots, contexts, backends_of(arguments.kv, arguments.linear)):
            rows.append(row)
            if not arguments.json:
                print(line(row), flush=True)
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    if arguments.plot:
        plot([row.as_dict() for row in rows], arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

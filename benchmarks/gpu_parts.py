"""The parts of `make gpu`, each a process of its own: important figures first, every row written as it is measured.

    PYTHONPATH=. python3 -m benchmarks.gpu_parts step --out out
    PYTHONPATH=. python3 -m benchmarks.gpu_parts capacity --out out --shape tiny --device cpu     # to try it out

A part that runs out of time or memory, or crashes, takes no other's figures with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import frame, prefill, step_parts
from benchmarks.capacity import CapacityBench, CapacityRow, most_slots
from benchmarks.frame import FrameBench, measure_codec
from benchmarks.gpu_report import Report, Section
from benchmarks.peer_steps import omni_step
from benchmarks.prefill import PrefillBench
from benchmarks.setting import Setting, device_name, options, random_lm, random_mimi, setting
from benchmarks.timing import copy_bandwidth, median_ms
from graphs.backends import default_dtype, make_cache
from graphs.ring_cache import RingCache
from graphs.slot_engine import DEFAULT_TILE

# Named, not "auto": a CPU then runs what CUDA captures, so that trying a part out tries all of it.
STATIC = {"model": "static", "fp8": "static-fp8"}


@dataclass(frozen=True)
class Plan:
    """What is measured, in order."""

    step: tuple[tuple[int, str, tuple[int, ...]], ...]  # slots, kv, frames held
    capacity: tuple[tuple[str, bool, int, int], ...]  # kv, overlapped, first count, limit
    frames: int  # for each count of the capacity
    prefill: tuple[int, int, int, int]  # slots, prompt, journal, repetitions
    overlap: tuple[tuple[int, str], ...]  # slots, kv
    codec: tuple[int, ...]
    parts: tuple[tuple[int, str], ...]
    peer: tuple[int, ...]


def plan_of(window: int) -> Plan:
    """For the published shape; for others as much of it as their window and a CPU's patience allow."""
    if window > 2_000:
        full, fills = (window,), (window // 4, 128)
        return Plan(
            step=(
                *((slots, "model", full) for slots in (32, 1, 16, 8)),
                *((slots, "fp8", full) for slots in (32, 72)),
                *((slots, "model", fills) for slots in (32, 1, 16, 8)),
            ),
            capacity=(("fp8", False, 72, 96), ("model", False, 32, 40), ("fp8", True, 72, 96)),
            frames=200,
            prefill=(32, 200, 3_000, 3),
            overlap=((32, "model"), (32, "fp8"), (16, "model")),
            codec=(32, 1, 8, 72),
            parts=((32, "model"), (1, "model"), (32, "fp8")),
            peer=(1, 16, 32),
        )
    return Plan(
        step=((4, "model", (window,)), (1, "fp8", (window,)), (4, "model", (window // 4,))),
        capacity=(("fp8", False, 2, 4), ("model", False, 2, 3), ("fp8", True, 2, 2)),
        frames=20,
        prefill=(3, 150, 200, 1),
        overlap=((2, "model"), (2, "fp8")),
        codec=(2, 1),
        parts=((2, "model"),),
        peer=(1, 2),
    )


@dataclass
class Job:
    """One part at work."""

    chosen: Setting
    plan: Plan
    section: Section
    wheel: Path | None

    @property
    def dtype(self) -> torch.dtype:
        return default_dtype(self.chosen.device)


def step(job: Job) -> None:
    """The frame step beside its roofline, with the codec's times."""
    bench = FrameBench(job.chosen.lm, job.chosen.mimi, job.chosen.device, job.dtype)
    names = {"model": str(job.dtype).removeprefix("torch."), "fp8": "float8_e4m3fn"}
    for slots, kv, contexts in job.plan.step:
        left = [
            context for context in contexts if not job.section.has(slots=slots, context_frames=context, kv=names[kv])
        ]
        if not left:
            continue
        try:
            for row in bench.measure(slots, left, STATIC[kv], runner="static"):
                print(frame.line(row), f"  KV {row.kv}", flush=True)
                job.section.add(row.as_dict())
        except torch.OutOfMemoryError:
            print(f"no memory for {slots} slots of full context, KV {kv}", flush=True)
        _give_back(job)


def capacity(job: Job) -> None:
    """The most conversations at p99 80 ms, codecs at work, in turn and overlapped."""
    bench = CapacityBench(job.chosen, job.dtype, job.plan.frames, runner="static")
    for kv, overlap, first, limit in job.plan.capacity:
        if job.section.has(asked=kv, overlap=overlap):
            continue
        bench.backend, bench.overlap = STATIC[kv], overlap

        def measure(slots: int) -> CapacityRow:
            row = bench.measure(slots)
            print(f"{slots:4d} conversations: p50 {row.p50_ms:6.1f} ms, p99 {row.p99_ms:6.1f} ms", flush=True)
            _give_back(job)
            return row

        rows = most_slots(measure, limit, first)
        most = max((row.slots for row in rows if row.holds), default=0)
        print(f"{most} conversations with KV {rows[0].kv}{', overlapped' if overlap else ''}", flush=True)
        each = [dataclasses.asdict(row) for row in rows]
        kept = next((row.kv for row in rows if row.fits), kv)
        job.section.add({"kv": kept, "asked": kv, "overlap": overlap, "most": most, "limit": limit, "rows": each})


def prompts(job: Job) -> None:
    """Prompts and journals beside all other slots at work."""
    slots, prompt, journal, repeat = job.plan.prefill
    model = random_lm(job.chosen.lm, job.chosen.device, job.dtype)
    bench = PrefillBench(model, slots, prompt, adaptive=True, backend=STATIC["model"])
    for row in bench.all_ways(journal, repeat):
        print(prefill.line(row), flush=True)
        job.section.add(dataclasses.asdict(row))


def overlap(job: Job) -> None:
    """Encode, step and decode one after the other, and under way at once on streams of their own."""
    bench = CapacityBench(job.chosen, job.dtype, job.plan.frames, runner="static")
    for slots, kv in job.plan.overlap:
        for at_once in (False, True):
            if job.section.has(slots=slots, asked=kv, overlap=at_once):
                continue
            bench.backend, bench.overlap = STATIC[kv], at_once
            row = bench.measure(slots)
            how = "at once" if at_once else "in turn"
            print(f"{slots:3d} slots, KV {kv}, {how}: p50 {row.p50_ms:.1f} ms, p99 {row.p99_ms:.1f} ms", flush=True)
            job.section.add({"asked": kv, **dataclasses.asdict(row)})
            _give_back(job)


def codec(job: Job) -> None:
    """Encode and decode, as one graph each and in operators."""
    mimi = random_mimi(job.chosen.mimi, job.chosen.device)
    for slots in job.plan.codec:
        for runner in ("static", "torch"):
            if job.section.has(slots=slots, runner=runner):
                continue
            encode_ms, decode_ms = measure_codec(mimi, slots, job.chosen.device, runner)
            print(f"{slots:3d} slots, {runner:6s}: encode {encode_ms:6.2f} ms, decode {decode_ms:6.2f} ms", flush=True)
            row = {"slots": slots, "runner": runner, "encode_ms": round(encode_ms, 3), "decode_ms": round(decode_ms, 3)}
            job.section.add(row)


@torch.inference_mode()
def parts(job: Job) -> None:
    """Where the step spends its time, by our products and by torch's."""
    device, lm = job.chosen.device, job.chosen.lm
    model, bandwidth = random_lm(lm, device, job.dtype), copy_bandwidth(device)
    for slots, kv in job.plan.parts:
        if job.section.has(slots=slots, asked=kv, part="whole"):
            continue
        cache = make_cache(lm, slots, DEFAULT_TILE, device=device, dtype=job.dtype, backend=STATIC[kv])
        assert isinstance(cache, RingCache)
        for row in step_parts.measure(model, cache, lm.window, bandwidth):
            print(f"{slots:3d} slots, KV {row.kv}: {step_parts.line(row)}", flush=True)
            job.section.add({"asked": kv, **dataclasses.asdict(row)})
        del cache
        _give_back(job)


@torch.inference_mode()
def peer(job: Job) -> None:
    """vllm-omni's native step, captured; its cost does not depend on how full its rings are."""
    if job.wheel is None and importlib.util.find_spec("vllm_omni") is None:
        print("vllm-omni is not here: unpack its 0.28.0 wheel and name the folder with --wheel", flush=True)
        return
    for slots in job.plan.peer:
        if job.section.has(slots=slots):
            continue
        try:
            taken = median_ms(
                omni_step(job.chosen.lm, slots, job.chosen.device, job.dtype, job.wheel), job.chosen.device
            )
        except torch.OutOfMemoryError:
            print(f"no memory for {slots} slots of vllm-omni", flush=True)
        else:
            print(f"vllm-omni at {slots} slots: {taken:.2f} ms", flush=True)
            job.section.add({"peer": "vllm-omni", "slots": slots, "ms": round(taken, 3), "dtype": str(job.dtype)})
        _give_back(job)


PARTS: dict[str, Callable[[Job], None]] = {
    "step": step,
    "capacity": capacity,
    "prefill": prompts,
    "overlap": overlap,
    "codec": codec,
    "parts": parts,
    "peer": peer,
}


def _give_back(job: Job) -> None:
    """Memory of what was just measured, before more is taken."""
    gc.collect()
    if job.chosen.device.type == "cuda":
        torch.cuda.empty_cache()


def part_options() -> argparse.ArgumentParser:
    """What each part, and so the whole of them, lets one choose."""
    parser = options("gpu", __doc__, shape="7b")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT/gpu.json has, measure the rest")
    parser.add_argument("--wheel", type=Path, help="a folder with vllm-omni 0.28.0's files, for the part `peer`")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = part_options()
    parser.prog = "python -m benchmarks.gpu_parts"
    parser.add_argument("part", choices=PARTS)
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    report = Report(arguments.out / "gpu.json")
    section = Section(report, arguments.part, resume=arguments.resume)
    print(f"{arguments.part}: {PARTS[arguments.part].__doc__}  [{device_name(chosen.device)}]", flush=True)
    PARTS[arguments.part](Job(chosen, plan_of(chosen.lm.window), section, arguments.wheel))
    return 0


if __name__ == "__main__":
    sys.exit(main())

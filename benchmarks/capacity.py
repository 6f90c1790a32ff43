"""How many conversations fit: the most slots, all contexts full, whose frames keep p99 under 80 ms.

    python -m benchmarks.capacity --shape demo
    python -m benchmarks.capacity --shape 7b --device cuda --json out/capacity.json --plot out/capacity.png

A frame is encode + frame step + decode, one after the other: what it costs where the three share one processor or one
GPU without MPS. Weights are random, sampling is on, the codec is at work; no Ray, no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.frame import device_name, pick_device, random_lm, random_mimi, shapes_of
from graphs.backends import default_dtype, make_cache
from graphs.codec import DecoderLane, EncoderLane
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import Span
from graphs.slot_engine import DEFAULT_TILE
from graphs.stages import Sampling
from models.config import AUDIO_CODEBOOKS, FRAME_MS, FRAME_SAMPLES, STREAMS, UNGENERATED
from models.lm import LanguageModel
from models.mimi import Mimi

WARM_UP = 10


@dataclass(frozen=True)
class CapacityRow:
    """`frames` frames of `slots` conversations with full contexts, in milliseconds."""

    slots: int
    frames: int
    p50_ms: float
    p99_ms: float
    device: str
    dtype: str
    fits: bool = True  # False: so many full contexts do not fit into the device's memory, nothing was measured

    @property
    def holds(self) -> bool:
        return self.fits and self.p99_ms <= FRAME_MS


class CapacityBench:
    """One model and one codec, measured at any number of slots."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, frames: int) -> None:
        """frames: measured per slot count; a p99 wants a few hundred. Raises ValueError for an unknown shape."""
        lm, mimi = shapes_of(shape)
        self._model: LanguageModel = random_lm(lm, device, dtype)
        self._codec: Mimi = random_mimi(mimi, device)
        self._device, self._frames = device, frames

    def measure(self, slots: int) -> CapacityRow:
        dtype = str(self._model.dtype).removeprefix("torch.")
        name = device_name(self._device)
        try:
            frame = self._frame(slots)
        except torch.OutOfMemoryError:
            return CapacityRow(slots, 0, 0.0, 0.0, name, dtype, fits=False)
        for _ in range(WARM_UP):
            frame()
        taken: list[float] = []
        for _ in range(self._frames):
            begun = time.perf_counter()
            frame()  # its results are on the host when it returns: nothing is left to wait for
            taken.append((time.perf_counter() - begun) * 1e3)
        p99 = statistics.quantiles(taken, n=100)[98]
        return CapacityRow(slots, self._frames, round(statistics.median(taken), 2), round(p99, 2), name, dtype)

    def _frame(self, slots: int) -> Callable[[], None]:
        model, device = self._model, self._device
        cache = make_cache(model.config, slots, DEFAULT_TILE, device=device, dtype=model.dtype)
        fixed = (slots + DEFAULT_TILE, slots) if device.type == "cuda" else (0, 0)
        step = FrameStep(model, cache, fixed_rows=fixed[0], fixed_emits=fixed[1])
        encoder, decoder = EncoderLane(self._codec, slots), DecoderLane(self._codec, slots)
        dice = np.random.default_rng(0)
        pcm = dice.integers(-8_000, 8_000, (slots, FRAME_SAMPLES)).astype(np.int16)
        column = dice.integers(0, model.config.card, (slots, STREAMS)).astype(np.int16)
        column[:, 0] %= model.config.text_card
        free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
        everyone = list(range(slots))
        position = 2 * model.config.context  # the window slides and the ring has wrapped

        def frame() -> None:
            nonlocal position
            column[:, 1 + AUDIO_CODEBOOKS :] = encoder.run(everyone, pcm)
            spans = [Span(slot, 1, slot, position) for slot in everyone]
            emits = [Emit(slot, position + 1, free, Sampling(), seed=slot) for slot in everyone]
            drawn = step.run(column, spans, emits)
            column[:, :GENERATED] = drawn
            decoder.run(everyone, drawn[:, 1:])
            position += 1

        return frame


def most_slots(measure: Callable[[int], CapacityRow], limit: int) -> list[CapacityRow]:
    """Doubles until a count fails, then halves the gap; every count is measured once. Rows in order of measurement.

    The answer is the largest row that holds; none does if one conversation is too many.
    """
    rows: list[CapacityRow] = []
    held, failed, count = 0, limit + 1, 1
    while failed - held > 1:
        row = measure(count)
        rows.append(row)
        if row.holds:
            held = count
        else:
            failed = count
        count = min(2 * held, limit) if failed > limit else (held + failed) // 2
    return rows


def plot(rows: Sequence[CapacityRow], path: Path) -> None:
    """p50 and p99 of a frame over the number of conversations, with the budget."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted((row for row in rows if row.fits), key=lambda row: row.slots)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    slots = [row.slots for row in rows]
    axes.plot(slots, [row.p99_ms for row in rows], "o-", color="#c2410c", label="p99")
    axes.plot(slots, [row.p50_ms for row in rows], "o-", color="#1d4ed8", label="p50")
    axes.axhline(FRAME_MS, color="#444444", linestyle="--", linewidth=1)
    axes.text(slots[0], FRAME_MS, " the budget: 80 ms", va="bottom", fontsize=9)
    axes.set(xlabel="conversations, contexts full", ylabel="encode + step + decode, ms", ylim=(0, None))
    axes.set_title(f"One frame on {rows[0].device}, {rows[0].dtype}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="demo", help="demo, 7b, or a checkpoint's folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; the server uses one")
    parser.add_argument("--frames", type=int, default=300, help="frames measured for each number of conversations")
    parser.add_argument("--limit", type=int, default=128, help="never try more conversations than this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        device = pick_device(arguments.device)
        bench = CapacityBench(arguments.shape, device, default_dtype(device), arguments.frames)
    except ValueError as error:
        parser.error(str(error))

    def measure(slots: int) -> CapacityRow:
        row = bench.measure(slots)
        verdict = "holds" if row.holds else "too many" if row.fits else "memory is full"
        print(f"{slots:4d} conversations: p50 {row.p50_ms:6.1f} ms, p99 {row.p99_ms:6.1f} ms  {verdict}", flush=True)
        return row

    rows = most_slots(measure, arguments.limit)
    best = max((row.slots for row in rows if row.holds), default=0)
    print(f"{best} conversations with full contexts keep p99 within {FRAME_MS:.0f} ms on {rows[0].device}")
    if arguments.json:
        content = {"most": best, "rows": [dataclasses.asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

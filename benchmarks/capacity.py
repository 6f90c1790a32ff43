"""How many conversations fit: the most slots, all contexts full, whose frames keep p99 under 80 ms.

    python -m benchmarks.capacity --shape demo
    python -m benchmarks.capacity --shape 7b --device cuda --json out/capacity.json --plot out/capacity.png

A frame is encode + frame step + decode, one after the other: what it costs where the three share one processor or one
GPU without MPS. With --overlap they are under way at once, on streams of their own: encode of the next frame, step of
this one, decode of the last. Weights are random, sampling is on, the codec is at work; no Ray, no network.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.frame import backends_of, choices
from benchmarks.setting import Setting, device_name, options, random_lm, random_mimi, setting
from graphs.backends import Backends, default_dtype, make_cache
from graphs.codec import DecoderLane, EncoderLane
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import Span
from graphs.slot_engine import DEFAULT_TILE
from graphs.stages import Sampling
from models.config import FRAME_MS, FRAME_SAMPLES, STREAMS, UNGENERATED
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
    kv: str = ""  # the dtype of keys and values
    overlap: bool = False  # encode, step and decode at once, else in turn
    fits: bool = True  # False: so many full contexts do not fit into the device's memory, nothing was measured

    @property
    def holds(self) -> bool:
        return self.fits and self.p99_ms <= FRAME_MS


class CapacityBench:
    """One model and one codec, measured at any number of slots."""

    def __init__(
        self,
        chosen: Setting,
        dtype: torch.dtype,
        frames: int,
        *,
        backend: str | Backends = "auto",
        runner: str = "auto",
        overlap: bool = False,
    ) -> None:
        """frames: measured per slot count; a p99 wants a few hundred. backend, runner: see graphs.backends, .codec."""
        self._device, self._frames = chosen.device, frames
        self._model: LanguageModel = random_lm(chosen.lm, chosen.device, dtype)
        self._codec: Mimi = random_mimi(chosen.mimi, chosen.device)
        self._runner = runner
        self.backend, self.overlap = backend, overlap  # may be changed between measurements

    def measure(self, slots: int) -> CapacityRow:
        """Frames of so many conversations with full contexts; a row that says so if they do not fit into memory."""
        dtype = str(self._model.dtype).removeprefix("torch.")
        name = device_name(self._device)
        try:
            frame, kv = self._frame(slots)
        except torch.OutOfMemoryError:
            return CapacityRow(slots, 0, 0.0, 0.0, name, dtype, overlap=self.overlap, fits=False)
        for _ in range(WARM_UP):
            frame()
        taken: list[float] = []
        for _ in range(self._frames):
            begun = time.perf_counter()
            frame()  # its results are on the host when it returns: nothing is left to wait for
            taken.append((time.perf_counter() - begun) * 1e3)
        p99 = statistics.quantiles(taken, n=100)[98]
        p50 = statistics.median(taken)
        return CapacityRow(slots, self._frames, round(p50, 2), round(p99, 2), name, dtype, kv, self.overlap)

    def _frame(self, slots: int) -> tuple[Callable[[], None], str]:
        """One call is a frame of all slots; and the dtype of their keys and values."""
        model, device = self._model, self._device
        cache = make_cache(model.config, slots, DEFAULT_TILE, device=device, dtype=model.dtype, backend=self.backend)
        fixed = (slots + DEFAULT_TILE, slots) if device.type == "cuda" else (0, 0)
        chosen = Backends(step=self.backend) if isinstance(self.backend, str) else self.backend
        step = FrameStep(model, cache, fixed_rows=fixed[0], fixed_emits=fixed[1], backends=chosen)
        encoder = EncoderLane(self._codec, slots, runner=self._runner)
        decoder = DecoderLane(self._codec, slots, runner=self._runner)
        dice = np.random.default_rng(0)
        pcm = dice.integers(-8_000, 8_000, (slots, FRAME_SAMPLES)).astype(np.int16)
        column = dice.integers(0, model.config.card, (slots, STREAMS)).astype(np.int16)
        column[:, 0] %= model.config.text_card
        free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
        everyone = list(range(slots))
        position = 2 * model.config.context  # the window slides and the ring has wrapped

        def advance() -> npt.NDArray[np.int16]:
            nonlocal position
            spans = [Span(slot, 1, slot, position) for slot in everyone]
            emits = [Emit(slot, position + 1, free, Sampling(), seed=slot) for slot in everyone]
            position += 1
            return step.run(column, spans, emits)

        def in_turn() -> None:
            column[:, GENERATED:] = encoder.run(everyone, pcm)
            column[:, :GENERATED] = advance()
            decoder.run(everyone, column[:, 1:GENERATED])

        def at_once() -> None:
            heard, said = encoder.start(everyone, pcm), decoder.start(everyone, column[:, 1:GENERATED])
            column[:, :GENERATED] = advance()
            column[:, GENERATED:] = heard()
            said()

        return at_once if self.overlap else in_turn, str(cache.keys.dtype).removeprefix("torch.")


def most_slots(measure: Callable[[int], CapacityRow], limit: int, first: int = 1) -> list[CapacityRow]:
    """Doubles `first` until a count fails, then halves the gap; none is measured twice. Rows as they were measured.

    The answer is the largest row that holds; none does if one conversation is too many.
    """
    rows: list[CapacityRow] = []
    held, failed, count = 0, limit + 1, min(first, limit)
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
    parser = options("capacity", __doc__)
    parser.add_argument("--frames", type=int, default=300, help="frames measured for each number of conversations")
    parser.add_argument("--limit", type=int, default=128, help="never try more conversations than this")
    parser.add_argument("--first", type=int, default=1, help="begin with so many")
    choices(parser)
    parser.add_argument("--overlap", action="store_true", help="encode, step and decode at once (on CUDA: streams)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture here")
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    bench = CapacityBench(
        chosen,
        default_dtype(chosen.device),
        arguments.frames,
        backend=backends_of(arguments.kv, arguments.linear),
        overlap=arguments.overlap,
    )

    def measure(slots: int) -> CapacityRow:
        row = bench.measure(slots)
        verdict = "holds" if row.holds else "too many" if row.fits else "memory is full"
        print(f"{slots:4d} conversations: p50 {row.p50_ms:6.1f} ms, p99 {row.p99_ms:6.1f} ms  {verdict}", flush=True)
        return row

    rows = most_slots(measure, arguments.limit, arguments.first)
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

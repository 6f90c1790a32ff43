"""What an anchor costs the frames before and at it: ms of a step, with a spare ring to prepare in and without.

    python -m benchmarks.anchors --shape demo --slots 4 16

All slots speak in every step, over contexts that fill up until each has anchored. Torch alone, random weights.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.conversations import noise_past, noise_prompt, open_all
from benchmarks.setting import device_name, options, random_lm, setting
from graphs.anchors import AnchorPolicy
from graphs.backends import default_dtype
from graphs.prefix_cache import PrefixCache, PrefixOwners
from graphs.slot_engine import SlotEngine
from models.config import AUDIO_CODEBOOKS
from models.lm import LanguageModel

FRAMES_BEFORE = 40  # the first anchor is at most so far away when the measurement begins


@dataclass(frozen=True)
class AnchorRow:
    """Steps of all slots; one is `busy` if a ring was filled beside its live rows, or an anchor was due with it."""

    slots: int
    spares: int
    anchors: int
    late: int  # anchors whose ring was not full in time, so that its frame had to wait
    quiet_ms: float
    busy_ms: float
    worst_ms: float
    ring_mb: float  # what each spare ring takes
    device: str
    threads: int


def measure(model: LanguageModel, slots: int, spares: int, prompt_frames: int) -> AnchorRow:
    """Runs until every slot has anchored once."""
    config, policy = model.config, AnchorPolicy()
    engine = SlotEngine(model, slots, anchors=policy, spares=spares, prefixes=PrefixCache())
    prompt = noise_prompt(config, prompt_frames)
    plans = [policy.plan(config.window, prompt.frames, slot) for slot in range(slots)]
    firsts = [plan.first for plan in plans if plan is not None]
    past = noise_past(config, max(1, min(firsts) - policy.lead - FRAMES_BEFORE))
    open_all(engine, range(slots), prompt, past, PrefixOwners())
    rows = 0
    step: Any = engine.frame_step  # watched, to see which steps have more than live rows
    run = step.run

    def counting(columns: npt.NDArray[np.int16], *rest: Any) -> Any:
        nonlocal rows
        rows += len(columns)
        return run(columns, *rest)

    step.run = counting
    codes = np.random.default_rng(0).integers(0, config.card, (slots, AUDIO_CODEBOOKS)).astype(np.int16)
    quiet: list[float] = []
    busy: list[float] = []
    while engine.anchors_done < slots:
        rows, started = 0, time.perf_counter()
        engine.step(range(slots), codes)
        took_ms = (time.perf_counter() - started) * 1e3
        (busy if rows > slots else quiet).append(took_ms)
    return AnchorRow(
        slots=slots,
        spares=spares,
        anchors=engine.anchors_done,
        late=engine.anchors_late,
        quiet_ms=round(statistics.median(quiet), 1),
        busy_ms=round(statistics.median(busy), 1),
        worst_ms=round(max(busy), 1),
        ring_mb=round(engine.cache.bytes_per_slot / 1e6, 1),
        device=device_name(model.device),
        threads=torch.get_num_threads(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("anchors", __doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--spares", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--prompt", type=int, default=200, help="frames")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    model = random_lm(chosen.lm, chosen.device, default_dtype(chosen.device))
    rows: list[AnchorRow] = []
    for slots in arguments.slots:
        for spares in arguments.spares:
            row = measure(model, slots, spares, arguments.prompt)
            rows.append(row)
            if not arguments.json:
                steps = (
                    f"a step {row.quiet_ms:5.1f} ms, with a ring to fill {row.busy_ms:5.1f}, worst {row.worst_ms:6.1f}"
                )
                counts = f"{row.anchors:2d} anchors, {row.late:2d} late"
                print(f"{slots:2d} slots, {spares} spare rings of {row.ring_mb} MB: {counts}; {steps}", flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

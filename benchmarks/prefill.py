"""Milliseconds from an open to ready, for a prompt and for a journal, while other conversations go on in real time.

    python -m benchmarks.prefill --shape demo --slots 4 16
    python -m benchmarks.prefill --shape 7b --slots 32 --journal 3000 --device cuda --json

All slots but one are live with full contexts and get a frame every 80 ms, all at once; between frames the engine steps
for the prompt alone, as a replica does. Torch alone; weights are random, since time does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.conversations import NOBODY, noise_past, noise_prompt, open_all
from benchmarks.setting import device_name, options, random_lm, setting
from graphs.backends import default_dtype
from graphs.prefill_budget import PrefillBudget
from graphs.prefix_cache import PrefixCache, PrefixOwners
from graphs.slot_engine import DEFAULT_TILE, SlotEngine
from graphs.stages import Past, Sampling
from models.config import AUDIO_CODEBOOKS, FRAME_MS
from models.lm import LanguageModel

OWNERS = PrefixOwners(role="tenant")
QUIET_FRAMES = 25  # how long the others are watched without a prompt


@dataclass(frozen=True)
class PrefillRow:
    """One measurement, medians over its repetitions; a live frame's time is from its arrival on."""

    what: str
    others: int
    frames: int
    ready_ms: float
    live_ms: float  # median of the others' frames meanwhile, over all repetitions
    live_p95_ms: float
    live_worst_ms: float
    quiet_ms: float  # median of the others' frames without a prompt
    budget: str  # "adaptive", or a whole tile in each step
    device: str
    dtype: str
    threads: int


class PrefillBench:
    """One model with `slots` slots, all but the last one live over full contexts."""

    def __init__(
        self, model: LanguageModel, slots: int, prompt_frames: int, *, adaptive: bool, backend: str = "auto"
    ) -> None:
        self._config, self._others = model.config, list(range(slots - 1))
        self._slot = slots - 1
        self._budget = PrefillBudget(DEFAULT_TILE) if adaptive else None
        self._adaptive = adaptive
        self._prompt = noise_prompt(self._config, prompt_frames)
        self._prefixes = PrefixCache(1 << 30)
        self._engine = SlotEngine(model, slots, backend=backend, budget=self._budget, prefixes=self._prefixes)
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._device = model.device
        past = noise_past(self._config, self._config.window - prompt_frames)
        open_all(self._engine, self._others, self._prompt, past)
        self._quiet_ms = statistics.median(self._run(until_ready=False)[1])

    def all_ways(self, journal_frames: int, repeat: int) -> Iterator[PrefillRow]:
        """A prompt and a journal, each with its prompt to compute and from the cache; rows as they are measured."""
        journal = noise_past(self._config, journal_frames)
        yield self.measure("prompt, uncached", None, cached=False, repeat=repeat)
        yield self.measure("prompt, cached", None, cached=True, repeat=repeat)
        yield self.measure("journal, uncached prompt", journal, cached=False, repeat=repeat)
        yield self.measure("journal, cached prompt", journal, cached=True, repeat=repeat)

    def measure(self, what: str, past: Past | None, *, cached: bool, repeat: int) -> PrefillRow:
        """Opens the last slot `repeat` times, each time until it is ready."""
        ready_ms: list[float] = []
        live_ms: list[float] = []
        for seed in range(repeat):
            if not cached:
                self._prefixes.forget("")
                self._prefixes.forget("tenant")
            started = time.perf_counter()
            self._engine.open(self._slot, self._prompt, Sampling(), seed, past=past, owners=OWNERS)
            done, frames = self._run(until_ready=True)
            ready_ms.append((done - started) * 1e3)
            live_ms += frames
            self._engine.close(self._slot)
            self._run(until_ready=False, frames=3)
        return PrefillRow(
            what=what,
            others=len(self._others),
            frames=self._prompt.frames if past is None else len(past.rows),
            ready_ms=round(statistics.median(ready_ms), 1),
            live_ms=round(statistics.median(live_ms), 1) if live_ms else 0.0,
            live_p95_ms=round(float(np.percentile(live_ms, 95)), 1) if live_ms else 0.0,
            live_worst_ms=round(max(live_ms, default=0.0), 1),
            quiet_ms=round(self._quiet_ms, 1),
            budget="adaptive" if self._adaptive else "whole tiles",
            device=device_name(self._device),
            dtype=self._dtype,
            threads=torch.get_num_threads(),
        )

    def _run(self, *, until_ready: bool, frames: int = QUIET_FRAMES) -> tuple[float, list[float]]:
        """Keeps the others talking until the last slot is ready, or for so many frames.

        Returns when that was, and how long each frame of the others took.
        """
        noise = np.random.default_rng(2).integers(0, self._config.card, (len(self._others), AUDIO_CODEBOOKS))
        codes, took = noise.astype(np.int16), []
        due = time.perf_counter() + FRAME_MS / 2e3  # the prompt comes in the middle between two frames
        while True:
            now = time.perf_counter()
            if self._others and now >= due:
                out = self._engine.step(self._others, codes)
                took.append((time.perf_counter() - due) * 1e3)
                due += FRAME_MS / 1e3
            elif until_ready:
                out = self._engine.step([], NOBODY)
            else:
                time.sleep(max(0.0, due - now))
                continue
            if self._slot in out.ready or (not until_ready and len(took) >= frames):
                return time.perf_counter(), took


def line(row: PrefillRow) -> str:
    spread = f"p95 {row.live_p95_ms:5.1f}, worst {row.live_worst_ms:5.1f}"
    others = f"frames took {row.live_ms:5.1f} ms ({spread}; alone {row.quiet_ms:5.1f})"
    ready = f"{row.frames:4d} frames ready in {row.ready_ms:7.1f} ms"
    return f"{row.what:24s} beside {row.others:2d}, {row.budget:11s}: {ready}; others' {others}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = options("prefill", __doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 16], help="the opened one included")
    parser.add_argument("--prompt", type=int, default=200, help="frames")
    parser.add_argument("--journal", type=int, default=750, help="frames")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    arguments = parser.parse_args(argv)
    chosen = setting(parser, arguments)
    model = random_lm(chosen.lm, chosen.device, default_dtype(chosen.device))
    rows: list[PrefillRow] = []
    for slots in arguments.slots:
        for adaptive in (True, False):
            bench = PrefillBench(model, slots, arguments.prompt, adaptive=adaptive)
            for row in bench.all_ways(arguments.journal, arguments.repeat):
                rows.append(row)
                if not arguments.json:
                    print(line(row), flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains the language model: `python -m training.lm --minutes 30`; the same command again goes on.

From scratch, on dialogues that `training.codes` encoded with the frozen codec: loss masked over the system prompt,
semantic codes before acoustic ones, padding counted less. On a CPU `--workers` threads share every step. The rate
follows a cosine over `--steps`; a run that reached them goes on under a new cosine with more. Runs on torch, numpy
and safetensors alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.config import FRAMES_PER_S, LMConfig
from models.demo_checkpoint import LM
from models.lm import LanguageModel
from training.folders import Log, state_folder
from training.lm_data import Drawing, EncodedDialogues, batches, draw
from training.lm_forward import initialise
from training.lm_team import FIGURES, Team
from training.optim import learning_rate, without_moments
from training.piece import Piece, progress, start
from training.state import load_state, save_state

CONFIG: LMConfig = dataclasses.replace(LM)
_VALIDATED = 24  # held-out dialogues


@dataclass(frozen=True)
class LMPreset:
    drawing: Drawing
    steps: int
    peak: float
    warmup: int = 500
    gradient_limit: float = 1.0
    validate_every: int = 250
    begun: int = 0  # the step at which the rate's cosine begins


# Sequences end where the first column leaves the window: behind that the model has forgotten who it is.
PRESETS = {
    "cpu": LMPreset(
        Drawing(
            batch=4, part=1, longest=LM.window - 1, hide=0.2, deaf=0.5, far=0.25, readings=0.2, lessons=0.2, late=0.1
        ),
        steps=6_000,
        peak=8e-4,
    ),
    "cuda": LMPreset(
        Drawing(batch=32, part=32, longest=LM.window - 1, hide=0.2, deaf=0.5, readings=0.2, lessons=0.2, late=0.1),
        steps=16_000,
        peak=8e-4,
    ),
}


def trained_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """A run's weights by the model's own names, in fp16 as they are kept, and its step.

    Raises FileNotFoundError if nothing is trained there.
    """
    saved = load_state(folder)
    if saved is None:
        raise FileNotFoundError(f"{folder} has no language model: run `python -m training.lm` first")
    return _weights(saved[0]), int(saved[1]["step"])


def trained_model(folder: Path) -> tuple[LanguageModel, int]:
    """A run's model in fp32, and its step. Raises FileNotFoundError if nothing is trained there."""
    weights, step = trained_weights(folder)
    model = LanguageModel(CONFIG)
    model.load_state_dict(weights)
    return model, step


def _weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in without_moments(stored).items()}


class LMRun:
    """Model, team and step of a run in a folder."""

    def __init__(self, folder: Path, workers: int, device: torch.device, seed: int) -> None:
        """Goes on from the state in `folder`, or begins."""
        self.folder, self.device, self.step = folder, device, 0
        self.model = LanguageModel(CONFIG)
        initialise(self.model, torch.Generator().manual_seed(seed))
        saved = load_state(folder)
        if saved is not None:
            self.model.load_state_dict(_weights(saved[0]))
            self.step = int(saved[1]["step"])
        self.model.to(device)
        self.team = Team(self.model, workers)
        if saved is not None:
            self.team.load_moments(saved[0], self.step)

    def save(self) -> None:
        """fp16 keeps eleven bits of a weight, and 29 million of them stay below 64 MB."""
        weights = {f"model.{name}": tensor.half() for name, tensor in self.model.state_dict().items()}
        save_state(self.folder, {**weights, **self.team.moments()}, {"step": self.step, "kind": "lm"})


def train(
    preset: LMPreset, folder: Path, codes: Path, piece: Piece, device: torch.device, seed: int = 7, workers: int = 1
) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    data, unseen = EncodedDialogues(codes, "train"), EncodedDialogues(codes, "held_out")
    # Always the same ones, nothing hidden.
    judged = dataclasses.replace(
        preset.drawing, batch=_VALIDATED, hide=0.0, deaf=0.0, far=1.0, readings=0.0, lessons=0.0, late=0.0
    )
    judged_batch = draw(unseen, CONFIG, judged, np.random.default_rng(2))
    run, log = LMRun(folder, workers, device, seed), Log(folder / "log.jsonl")
    hours = data.frames / FRAMES_PER_S / 3600
    print(f"{hours:.2f} h in {len(data.items)} dialogues, from step {run.step}, {workers} threads", flush=True)
    ticked, frames, seen = time.monotonic(), 0, list[dict[str, float]]()
    stream = batches(data, CONFIG, preset.drawing, seed, run.step)
    for batch in stream:
        if run.step >= preset.steps or piece.over():
            break
        since, total = run.step - preset.begun, preset.steps - preset.begun
        rate = learning_rate(since, peak=preset.peak, warmup=min(preset.warmup, total // 10), total=total)
        figures, norm = run.team.learn(batch, rate, preset.gradient_limit)
        run.step += 1
        frames += batch.frames
        seen.append(figures)
        if run.step % 10 == 0:
            speed = frames / (time.monotonic() - ticked)
            means = {name: float(np.mean([figures[name] for figures in seen])) for name in FIGURES}
            log.write(step=run.step, grad=norm, rate=rate, frames_per_s=round(speed, 1), **means)
            progress(run.step, preset.steps, f"{speed:.0f} frames/s", means)
            ticked, frames, seen = time.monotonic(), 0, []
        if run.step % preset.validate_every == 0:
            held_out = run.team.validate([judged_batch])
            log.write(step=run.step, **{f"val_{name}": value for name, value in held_out.items()})
            ticked = time.monotonic()
        if piece.due():
            run.save()
    stream.close()
    run.team.close()
    run.save()
    print(f"\nat step {run.step} of {preset.steps}; state in {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of this piece; 0: until the run is done")
    parser.add_argument("--steps", type=int, help="where the rate's cosine ends (default: the preset's)")
    parser.add_argument("--begun", type=int, default=0, help="where that cosine begins: for other data, a new one")
    parser.add_argument("--peak", type=float, help="its highest rate (default: the preset's)")
    parser.add_argument("--workers", type=int, default=1, help="threads that share a step; one per core that is idle")
    parser.add_argument("--folder", type=Path, default=state_folder() / "lm")
    parser.add_argument("--codes", type=Path, default=state_folder() / "codes")
    arguments = parser.parse_args()
    piece, device = start(arguments.minutes, 1)
    preset = PRESETS[arguments.preset]
    steps, peak = arguments.steps or preset.steps, arguments.peak or preset.peak
    if not 0 <= arguments.begun < steps:
        parser.error(f"a cosine that begins at step {arguments.begun} cannot end at {steps}")
    preset = dataclasses.replace(preset, steps=steps, peak=peak, begun=arguments.begun)
    workers = arguments.workers if device.type == "cpu" else 1
    train(preset, arguments.folder, arguments.codes, piece, device, workers=workers)


if __name__ == "__main__":
    main()

"""Trains the language model: `python -m training.lm --minutes 30`; the same command again goes on.

From scratch, on dialogues that `training.codes` encoded with the frozen codec: loss masked over the system prompt,
semantic codes before acoustic ones, padding counted less. Runs on torch, numpy and safetensors alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AUDIO_CODEBOOKS, FRAMES_PER_S, TEXT_PAD, LMConfig
from models.demo_checkpoint import LM
from models.lm import LanguageModel
from training.folders import Log, state_folder
from training.lm_data import EncodedDialogues, LMBatch, Weights, batches, draw
from training.lm_forward import Logits, forward, initialise
from training.optim import adamw, learning_rate, pack_moments, unpack_moments, without_moments
from training.piece import Piece, progress, start
from training.state import load_state, save_state

CONFIG: LMConfig = dataclasses.replace(LM)
_FIGURES = ("text", "words", "semantic", "acoustic")


@dataclass(frozen=True)
class LMPreset:
    batch: int
    longest: int  # columns of a sequence
    steps: int
    peak: float
    warmup: int = 500
    weights: Weights = dataclasses.field(default_factory=Weights)
    validate_every: int = 250


PRESETS = {
    "cpu": LMPreset(batch=4, longest=640, steps=20_000, peak=8e-4),
    "cuda": LMPreset(batch=32, longest=768, steps=16_000, peak=8e-4),
}


def loss_of(logits: Logits, batch: LMBatch) -> tuple[Tensor, dict[str, float]]:
    """The weighted mean loss, and plain means in nats: text, words (no padding), semantic, acoustic."""
    following = batch.columns.reshape(-1, batch.columns.shape[-1])[batch.rows + 1]
    text = F.cross_entropy(logits.text, following[:, 0], reduction="none")
    codes = following[:, 1 : 1 + AUDIO_CODEBOOKS].t()  # [8, rows]
    audio = F.cross_entropy(logits.audio.flatten(0, 1), codes.flatten(), reduction="none").view(codes.shape)
    weights = batch.weights.t()  # [9, rows]
    # Each kind is averaged over its own weight, so that a batch's mix of padding and words does not move the others.
    total = (text * weights[0]).sum() / weights[0].sum().clamp(min=1.0)
    total = total + (audio * weights[1:]).sum() / (weights[1] > 0).sum().clamp(min=1)
    with torch.no_grad():
        counted, word = weights[0] > 0, (weights[0] > 0) & (following[:, 0] != TEXT_PAD)
        figures = {
            "text": float(text[counted].mean()),
            "words": float(text[word].mean()) if bool(word.any()) else 0.0,
            "semantic": float(audio[0][weights[1] > 0].mean()),
            "acoustic": float(audio[1:][weights[2:] > 0].mean()),
        }
    return total, figures


def _stored(model: LanguageModel) -> dict[str, Tensor]:
    """Weights for the resume state: fp16 keeps eleven bits, and 29 million of them stay below 64 MB."""
    return {f"model.{name}": tensor.half() for name, tensor in model.state_dict().items()}


def train(preset: LMPreset, folder: Path, codes: Path, piece: Piece, device: torch.device, seed: int = 7) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    data, unseen = EncodedDialogues(codes, "train"), EncodedDialogues(codes, "held_out")
    model = LanguageModel(CONFIG)
    initialise(model, torch.Generator().manual_seed(seed))
    model = model.to(device)
    optimizer = adamw(model, betas=(0.9, 0.95), weight_decay=0.05)
    named = list(model.named_parameters())
    step = 0
    if (saved := load_state(folder)) is not None:
        stored = without_moments(saved[0])
        model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in stored.items()})
        step = int(saved[1]["step"])
        unpack_moments(optimizer, named, saved[0], step)
    log = Log(folder / "log.jsonl")

    def save() -> None:
        save_state(folder, {**_stored(model), **pack_moments(optimizer, named)}, {"step": step, "kind": "lm"})

    print(f"{data.frames / FRAMES_PER_S / 3600:.2f} h in {len(data.items)} dialogues, from step {step}", flush=True)
    ticked, frames, sums = time.monotonic(), 0, dict.fromkeys(_FIGURES, 0.0)
    model.train()
    stream = batches(data, CONFIG, preset.batch, preset.longest, preset.weights, seed, step)
    for batch in stream:
        if step >= preset.steps or piece.over():
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=preset.peak, warmup=preset.warmup, total=preset.steps)
        batch = LMBatch(*(tensor.to(device) for tensor in batch))
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(model, batch.columns, batch.rows)
        total, figures = loss_of(logits, batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        frames += batch.columns.shape[0] * batch.columns.shape[1]
        sums = {name: value + figures[name] for name, value in sums.items()}
        if step % 10 == 0:
            rate = frames / (time.monotonic() - ticked)
            means = {name: value / 10 for name, value in sums.items()}
            log.write(step=step, grad=float(norm), frames_per_s=round(rate, 1), **means)
            progress(step, preset.steps, f"{rate:.0f} frames/s", means)
            ticked, frames, sums = time.monotonic(), 0, dict.fromkeys(_FIGURES, 0.0)
        if step % preset.validate_every == 0:
            log.write(step=step, **validate(model, unseen, preset, device))
            ticked = time.monotonic()
        if piece.due():
            save()
    stream.close()
    save()
    print(f"\nat step {step} of {preset.steps}; state in {folder}", flush=True)


@torch.no_grad()
def validate(model: LanguageModel, data: EncodedDialogues, preset: LMPreset, device: torch.device) -> dict[str, float]:
    """Mean losses on held-out dialogues, always the same ones."""
    model.eval()
    every = []
    for number in range(6):
        batch = draw(data, CONFIG, 4, preset.longest, preset.weights, np.random.default_rng([2, number]))
        batch = LMBatch(*(tensor.to(device) for tensor in batch))
        every.append(loss_of(forward(model, batch.columns, batch.rows), batch)[1])
    model.train()
    return {f"val_{name}": float(np.mean([figures[name] for figures in every])) for name in _FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of this piece; 0: until the run is done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=state_folder() / "lm")
    parser.add_argument("--codes", type=Path, default=state_folder() / "codes")
    arguments = parser.parse_args()
    piece, device = start(arguments.minutes, arguments.threads)
    train(PRESETS[arguments.preset], arguments.folder, arguments.codes, piece, device)


if __name__ == "__main__":
    main()

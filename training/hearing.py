"""Teaches the codec to hear: `python -m training.hearing --minutes 30`; the same command again goes on.

The encoder's half of the served model (models/mimi.py) learns to tell, of every frame, its eight log-mel columns and
what a speech encoder makes of it, each by a linear layer that only training has. No quantizer and no decoder take
part: what is heard is the same for every voice that will say it, learns from a plain regression, and takes half the
time of a round trip. `personaplex train freeze` then fits the codebooks to it (training/fit_codebooks.py), and
`training.codec` teaches the way back to sound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import FRAME_SAMPLES, SAMPLE_RATE, MimiConfig
from models.demo_checkpoint import random_mimi
from models.mimi import Mimi
from training import codec_model
from training.average import Average, averaged, newest
from training.codec_data import CodecBatch, PackedSpeech, batches, draw
from training.folders import Log, state_folder
from training.optim import adamw, clip, learning_rate, pack_moments, set_rate, unpack_moments, without_moments
from training.piece import Piece, progress, start
from training.spectrogram import NATS, WIDTH, columns
from training.state import load_state, save_state


@dataclass(frozen=True)
class HearingPreset:
    batch: int
    frames: int  # of a crop
    steps: int
    peak: float
    warmup: int = 200
    speech_weight: float = 0.3  # of what the speech encoder hears, against the columns' L1
    gradient_limit: float = 1.0
    validate_every: int = 250


PRESETS = {
    "cpu": HearingPreset(batch=4, frames=36, steps=20_000, peak=7e-4),
    "cuda": HearingPreset(batch=64, frames=48, steps=12_000, peak=1e-3),
}


class Hearing(nn.Module):
    """The codec's encoder, and two linear readings of its latent."""

    def __init__(self, config: MimiConfig, features: int) -> None:
        super().__init__()
        self.mimi = Mimi(config)
        self.mimi.load_state_dict(random_mimi(config))
        for part in (self.mimi.decoder, self.mimi.decoder_transformer, self.mimi.upsample, self.mimi.quantizer):
            part.requires_grad_(False)
        self.columns = nn.Linear(config.seanet.dimension, WIDTH)
        self.features = nn.Linear(config.seanet.dimension, features)
        # Codebooks are entries in the product of latent and weight. With a bias that moved, they would stand for
        # other columns under an encoder that has learnt more (training/fit_codebooks.py).
        for reading in (self.columns, self.features):
            nn.init.zeros_(reading.bias).requires_grad_(False)

    def latent(self, audio: Tensor) -> Tensor:
        """audio [batch, frames * 1920] → [batch, frames, dim]."""
        return self.mimi.encode_latent(audio.unsqueeze(1)).transpose(1, 2)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """audio [batch, frames * 1920] → columns [batch, frames, WIDTH] and features [batch, frames, features]."""
        latent = self.latent(audio)
        return self.columns(latent), self.features(latent)

    def heard(self) -> dict[str, Tensor]:
        """What this training changes: the state without the decoder's half."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("mimi.") or codec_model.encodes(name.removeprefix("mimi."))
        }


def losses_of(model: Hearing, batch: CodecBatch) -> dict[str, Tensor]:
    """L1 of the columns in nats, and one minus the cosine to the speech encoder's features."""
    said, features = model(batch.audio)
    distance = 1.0 - F.cosine_similarity(features, batch.semantic, dim=-1)
    weight = batch.spoken.float().unsqueeze(1).expand_as(distance)
    return {
        "columns": NATS * F.l1_loss(said, columns(batch.audio)),
        "speech": (distance * weight).sum() / weight.sum().clamp(min=1.0),
    }


def load_hearing(folder: Path, features: int) -> tuple[Hearing, int]:
    """The encoder as trained so far, its weights averaged, and its step. Raises FileNotFoundError if there is none."""
    saved = load_state(folder)
    if saved is None:
        raise FileNotFoundError(f"{folder} has no encoder: run `python -m training.hearing` first")
    model = Hearing(codec_model.CONFIG, features)
    model.load_state_dict({**model.state_dict(), **averaged(without_moments(saved[0]))})
    return model.eval(), int(saved[1]["step"])


def train(preset: HearingPreset, folder: Path, pcm: Path, piece: Piece, device: torch.device, seed: int = 5) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    speech, unseen, log = PackedSpeech(pcm, "train"), PackedSpeech(pcm, "val"), Log(folder / "log.jsonl")
    torch.manual_seed(seed)
    model = Hearing(codec_model.CONFIG, speech.features).to(device).train()
    optimizer = adamw(model.named_parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    average, step = Average(model), 0
    if (saved := load_state(folder)) is not None:
        model.load_state_dict({**model.state_dict(), **newest(without_moments(saved[0]))})
        step = int(saved[1]["step"])
        average.load(saved[0], step)
        unpack_moments(optimizer, model.named_parameters(), saved[0], step)

    def save() -> None:
        tensors = {**model.heard(), **average.state(), **pack_moments(optimizer, model.named_parameters())}
        save_state(folder, tensors, {"step": step, "kind": "hearing"})

    ticked, audio_s, sums = time.monotonic(), 0.0, dict[str, float]()
    stream = batches(speech, preset.batch, preset.frames, seed, step)
    for drawn in stream:
        if step >= preset.steps or piece.over():
            break
        batch = CodecBatch(*(tensor.to(device) for tensor in drawn))
        set_rate(optimizer, learning_rate(step, peak=preset.peak, warmup=preset.warmup, total=preset.steps))
        losses = losses_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses["columns"] + preset.speech_weight * losses["speech"])
        norm = clip(optimizer, preset.gradient_limit)
        optimizer.step()
        average.update()
        step += 1
        figures = {name: float(value.detach()) for name, value in losses.items()} | {"grad": norm}
        sums = {name: sums.get(name, 0.0) + value for name, value in figures.items()}
        audio_s += preset.batch * preset.frames * FRAME_SAMPLES / SAMPLE_RATE
        if step % 20 == 0:
            rate = audio_s / (time.monotonic() - ticked)
            means = {name: value / 20 for name, value in sums.items()}
            log.write(step=step, audio_per_s=round(rate, 2), **means)
            progress(step, preset.steps, f"{rate:.1f} x real time", means)
            ticked, audio_s, sums = time.monotonic(), 0.0, {}
        if step % preset.validate_every == 0:
            with average:
                log.write(step=step, **validate(model, unseen, preset, device))
        if piece.due():
            save()
    stream.close()
    save()
    print(f"\nat step {step} of {preset.steps}; state in {folder}", flush=True)


@torch.no_grad()
def validate(model: Hearing, speech: PackedSpeech, preset: HearingPreset, device: torch.device) -> dict[str, float]:
    """Mean losses on unseen speech, always the same crops."""
    model.eval()
    every: list[dict[str, float]] = []
    for number in range(12):
        drawn = draw(speech, 4, preset.frames, np.random.default_rng([1, number]))
        losses = losses_of(model, CodecBatch(*(tensor.to(device) for tensor in drawn)))
        every.append({name: float(value) for name, value in losses.items()})
    model.train()
    return {f"val_{name}": float(np.mean([losses[name] for losses in every])) for name in every[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of this piece; 0: until the run is done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=state_folder() / "hearing")
    parser.add_argument("--pcm", type=Path, default=state_folder() / "pcm")
    arguments = parser.parse_args()
    piece, device = start(arguments.minutes, arguments.threads)
    train(PRESETS[arguments.preset], arguments.folder, arguments.pcm, piece, device)


if __name__ == "__main__":
    main()

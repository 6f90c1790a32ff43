"""Teaches the codec to speak: `python -m training.codec --minutes 30`; the same command again goes on.

The model is the served one (models/mimi.py), its codes as `training.fit_codebooks` left them: only the way back to
sound learns, so a language model can learn the codes meanwhile. Phase one is reconstruction: mel spectrograms at
four scales, and the columns that the decoder's transformer has to say. Phase two adds discriminators. Runs on torch,
numpy and safetensors alone.
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

from models.config import FRAME_SAMPLES, SAMPLE_RATE
from training import codec_model
from training.adversarial import Discriminators, discriminator_loss, generator_losses
from training.average import Average, newest
from training.codec_data import PackedSpeech, batches, draw
from training.codec_losses import SpectralLoss
from training.codec_model import CodecTrainer
from training.folders import Log, state_folder
from training.optim import adamw, clip, learning_rate, pack_moments, set_rate, unpack_moments, without_moments
from training.piece import Piece, progress, start
from training.spectrogram import NATS, columns
from training.state import load_state, save_state

_BETAS = (0.9, 0.99)
_JUDGE = "judge."
# The last convolution makes samples near 0.1 from activations near 1: its weights are a thirtieth of the others'.
# At the common rate a step changed each by 5 %, and its gradients were 98 % of the norm that is clipped.
_LOUDNESS = ("mimi.decoder.model.14.", 0.03)


@dataclass(frozen=True)
class CodecPreset:
    batch: int
    frames: int  # of a crop
    steps: int
    peak: float
    adversarial_from: int | None  # step at which discriminators start to learn
    warmup: int = 200
    judge_warmup: int = 500  # steps the discriminators learn alone before the codec listens to them
    columns_weight: float = 0.5
    loud_weight: float = 20.0  # of the square roots' distance
    reconstruction_weight: float = 15.0  # against the two below, in phase two
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    gradient_limit: float = 1.0
    validate_every: int = 500


# On a CPU the discriminators would cost more than the codec: phase two is for a GPU.
PRESETS = {
    "cpu": CodecPreset(batch=6, frames=24, steps=20_000, peak=1e-3, adversarial_from=None),
    "cuda": CodecPreset(batch=64, frames=48, steps=20_000, peak=1e-3, adversarial_from=6_000),
}


class CodecRun:
    """Model, discriminators and optimizers of one run, and how far it is."""

    def __init__(self, preset: CodecPreset, folder: Path, device: torch.device, seed: int) -> None:
        """Goes on from the state in `folder`. Raises FileNotFoundError if it has no codebooks yet."""
        torch.manual_seed(seed)
        self.preset, self.device = preset, device
        self.trainer = CodecTrainer(codec_model.CONFIG).to(device)
        self.judge = Discriminators().to(device)
        self.loss = SpectralLoss().to(device)
        self.optimizer = adamw(self.trainer.named_parameters(), betas=_BETAS, weight_decay=1e-3, fine=_LOUDNESS)
        self.judge_optimizer = adamw(self.judge.named_parameters(), betas=(0.8, 0.99), weight_decay=1e-3)
        saved = load_state(folder)
        if saved is None:
            raise FileNotFoundError(
                f"{folder} has no codebooks: run `python -m training.hearing`, then `python -m training.fit_codebooks`"
            )
        tensors, about = saved
        self.step, self.hearing_step = int(about["step"]), int(about["hearing_step"])
        weights = without_moments(tensors)
        own = {name: tensor for name, tensor in weights.items() if not name.startswith(_JUDGE)}
        self.trainer.load_state_dict({**self.trainer.state_dict(), **newest(own)})
        self.average = Average(self.trainer)
        self.average.load(own, self.step)
        unpack_moments(self.optimizer, self.trainer.named_parameters(), tensors, self.step)
        if judge := {n.removeprefix(_JUDGE): t for n, t in weights.items() if n.startswith(_JUDGE)}:
            self.judge.load_state_dict(judge)
            unpack_moments(self.judge_optimizer, self._named_judge(), tensors, self.step)

    @property
    def judging(self) -> bool:
        return self.preset.adversarial_from is not None and self.step >= self.preset.adversarial_from

    def save(self, folder: Path) -> None:
        """Leaves everything that going on needs."""
        moments = pack_moments(self.optimizer, self.trainer.named_parameters())
        tensors = {**self.trainer.state_dict(), **self.average.state(), **moments}
        if self.judging:
            tensors.update({f"{_JUDGE}{name}": tensor for name, tensor in self.judge.state_dict().items()})
            tensors.update(pack_moments(self.judge_optimizer, self._named_judge()))
        save_state(folder, tensors, {"step": self.step, "kind": "codec", "hearing_step": self.hearing_step})

    def _named_judge(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{_JUDGE}{name}", parameter) for name, parameter in self.judge.named_parameters()]

    def learn(self, audio: Tensor) -> dict[str, float]:
        """One step on a batch [batch, samples]. Returns the losses it saw."""
        preset, audio = self.preset, audio.to(self.device)
        rate = learning_rate(self.step, peak=preset.peak, warmup=preset.warmup, total=preset.steps)
        set_rate(self.optimizer, rate)
        set_rate(self.judge_optimizer, rate)
        output, said = self.trainer(audio)
        losses = self._reconstruction(output, said, audio)
        total = losses["mel"] + preset.loud_weight * losses["loud"] + preset.columns_weight * losses["columns"]
        if self.judging:
            total = preset.reconstruction_weight * total + self._adversarial(output, audio, losses)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        norm = clip(self.optimizer, preset.gradient_limit)
        self.optimizer.step()
        self.average.update()
        self.step += 1
        return {name: float(value.detach()) for name, value in losses.items()} | {"grad": norm}

    def _reconstruction(self, output: Tensor, said: Tensor, audio: Tensor) -> dict[str, Tensor]:
        mel, loud = self.loss(output, audio)
        return {"mel": mel, "loud": loud, "columns": NATS * F.l1_loss(said, columns(audio))}

    def _adversarial(self, output: Tensor, audio: Tensor, losses: dict[str, Tensor]) -> Tensor:
        """Teaches the discriminators a step; returns what they add to the codec's loss."""
        with torch.autocast(self.device.type, torch.bfloat16):
            judged = discriminator_loss(self.judge(audio), self.judge(output.detach()))
        self.judge_optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(judged)
        nn.utils.clip_grad_norm_(self.judge.parameters(), 1.0)
        self.judge_optimizer.step()
        losses["judge"] = judged
        if self.step < (self.preset.adversarial_from or 0) + self.preset.judge_warmup:
            return torch.zeros((), device=self.device)
        self.judge.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16):
            fooled, features = generator_losses(self.judge(audio), self.judge(output))
        self.judge.requires_grad_(True)
        losses["fooled"], losses["features"] = fooled, features
        return self.preset.adversarial_weight * fooled + self.preset.feature_weight * features

    @torch.no_grad()
    def validate(self, speech: PackedSpeech) -> dict[str, float]:
        """The losses on unseen speech, always the same crops."""
        self.trainer.eval()
        every = []
        for number in range(12):
            audio = draw(speech, 4, 48, np.random.default_rng([1, number]), clean=True).audio.to(self.device)
            output, said = self.trainer(audio)
            losses = self._reconstruction(output, said, audio)
            every.append({name: float(value) for name, value in losses.items()})
        self.trainer.train()
        return {f"val_{name}": float(np.mean([losses[name] for losses in every])) for name in every[0]}


def train(preset: CodecPreset, folder: Path, pcm: Path, piece: Piece, device: torch.device, seed: int = 5) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    speech, unseen, log = PackedSpeech(pcm, "train"), PackedSpeech(pcm, "val"), Log(folder / "log.jsonl")
    run = CodecRun(preset, folder, device, seed)
    run.trainer.train()
    ticked, audio_s, sums = time.monotonic(), 0.0, dict[str, float]()
    stream = batches(speech, preset.batch, preset.frames, seed, run.step, clean=True)
    for batch in stream:
        if run.step >= preset.steps or piece.over():
            break
        sums = {name: sums.get(name, 0.0) + value for name, value in run.learn(batch.audio).items()}
        audio_s += preset.batch * preset.frames * FRAME_SAMPLES / SAMPLE_RATE
        if run.step % 20 == 0:
            rate = audio_s / (time.monotonic() - ticked)
            means = {name: value / 20 for name, value in sums.items()}
            log.write(step=run.step, audio_per_s=round(rate, 2), **means)
            progress(run.step, preset.steps, f"{rate:.1f} x real time", means)
            ticked, audio_s, sums = time.monotonic(), 0.0, {}
        if run.step % preset.validate_every == 0:
            with run.average:
                log.write(step=run.step, **run.validate(unseen))
        if piece.due():
            run.save(folder)
    stream.close()
    run.save(folder)
    print(f"\nat step {run.step} of {preset.steps}; state in {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of this piece; 0: until the run is done")
    parser.add_argument("--steps", type=int, help="where the rate's cosine ends (default: the preset's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=state_folder() / "codec")
    parser.add_argument("--pcm", type=Path, default=state_folder() / "pcm")
    arguments = parser.parse_args()
    piece, device = start(arguments.minutes, arguments.threads)
    preset = PRESETS[arguments.preset]
    preset = dataclasses.replace(preset, steps=arguments.steps or preset.steps)
    train(preset, arguments.folder, arguments.pcm, piece, device)


if __name__ == "__main__":
    main()

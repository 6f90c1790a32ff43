"""Trains the codec: `python -m training.codec --minutes 30`; the same command again goes on.

The model is the served one (models/mimi.py). Phase one is reconstruction: log-mel at four scales and waveform L1,
codebooks by moving averages, half the crops unquantised as the published Mimi has it, the first codebook distilled
from a speech encoder. Phase two adds discriminators. After `personaplex train freeze` the
codes stay as they are and only their way back to sound goes on learning, so a language model can learn them
meanwhile. Runs on torch, numpy and safetensors alone.
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

from models.config import FRAME_SAMPLES, SAMPLE_RATE
from models.mimi_quantizer import Quantized
from training import codebooks, codec_model
from training.adversarial import Discriminators, discriminator_loss, generator_losses
from training.codec_data import CodecBatch, PackedSpeech, batches, draw
from training.codec_losses import MelLoss
from training.codec_model import CodecTrainer
from training.folders import FROZEN, Log, state_folder
from training.optim import adamw, learning_rate, pack_moments, unpack_moments, without_moments
from training.piece import Piece, progress, start
from training.state import load_state, save_state

_FIRST_LATENTS = 48  # batches the codebooks' first entries are drawn from
_BETAS = (0.8, 0.99)
_JUDGE = "judge."


@dataclass(frozen=True)
class CodecPreset:
    batch: int
    frames: int  # of a crop
    steps: int
    peak: float
    adversarial_from: int | None  # step at which discriminators start to learn
    decoder_steps: int = 20_000  # after freezing, with a schedule of their own
    decoder_peak: float = 3e-4
    warmup: int = 500
    quantise_from: int = 400  # steps; before that the latent has no shape worth quantising
    judge_warmup: int = 500  # steps the discriminators learn alone before the codec listens to them
    envelope_weight: float = 2.0
    wave_weight: float = 0.1  # the codes cannot say a phase; where it is not known, L1 asks for silence
    commit_weight: float = 0.2
    semantic_weight: float = 0.5
    reconstruction_weight: float = 15.0  # against the two below, in phase two
    adversarial_weight: float = 1.0
    feature_weight: float = 2.0
    validate_every: int = 500


# On a CPU the discriminators would cost more than the codec: phase two is for a GPU.
PRESETS = {
    "cpu": CodecPreset(batch=4, frames=36, steps=16_000, peak=3e-4, adversarial_from=None),
    "cuda": CodecPreset(batch=64, frames=48, steps=16_000, peak=1e-3, adversarial_from=8_000),
}


class CodecRun:
    """Model, discriminators and optimizers of one run, and how far it is."""

    def __init__(
        self, preset: CodecPreset, speech: PackedSpeech, device: torch.device, seed: int, frozen_at: int | None = None
    ) -> None:
        """frozen_at: the step from which the codes stay as they are, and every crop goes through them."""
        torch.manual_seed(seed)
        self.frozen_at = frozen_at
        self.preset, self.speech, self.device, self.seed, self.step = preset, speech, device, seed, 0
        self.trainer = CodecTrainer(codec_model.CONFIG, speech.features).to(device)
        if self.frozen:
            self.trainer.freeze_hearing()
        self.judge = Discriminators().to(device)
        self.mel = MelLoss().to(device)
        self.optimizer = adamw(self.trainer, betas=_BETAS, weight_decay=1e-3)
        self.judge_optimizer = adamw(self.judge, betas=_BETAS, weight_decay=1e-3)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def frozen(self) -> bool:
        return self.frozen_at is not None

    @property
    def last_step(self) -> int:
        return self.preset.steps if self.frozen_at is None else self.frozen_at + self.preset.decoder_steps

    @property
    def judging(self) -> bool:
        return self.preset.adversarial_from is not None and self.step >= self.preset.adversarial_from

    def _rate(self) -> float:
        preset = self.preset
        if self.frozen_at is None:
            return learning_rate(self.step, peak=preset.peak, warmup=preset.warmup, total=preset.steps)
        since = self.step - self.frozen_at
        return learning_rate(since, peak=preset.decoder_peak, warmup=preset.warmup, total=preset.decoder_steps)

    def load(self, folder: Path) -> None:
        """Goes on from the state in `folder`, if there is one."""
        if (saved := load_state(folder)) is None:
            return
        tensors, about = saved
        self.step = int(about["step"])
        self._generator.manual_seed(self.seed + self.step)
        weights = without_moments(tensors)
        judge = {name.removeprefix(_JUDGE): t for name, t in weights.items() if name.startswith(_JUDGE)}
        self.trainer.load_state_dict({name: t for name, t in weights.items() if not name.startswith(_JUDGE)})
        unpack_moments(self.optimizer, self.trainer.named_parameters(), tensors, self.step)
        if judge:
            self.judge.load_state_dict(judge)
            unpack_moments(self.judge_optimizer, self._named_judge(), tensors, self.step)

    def save(self, folder: Path) -> None:
        """Leaves everything that going on needs."""
        tensors = {**self.trainer.state_dict(), **pack_moments(self.optimizer, self.trainer.named_parameters())}
        if self.judging:
            tensors.update({f"{_JUDGE}{name}": tensor for name, tensor in self.judge.state_dict().items()})
            tensors.update(pack_moments(self.judge_optimizer, self._named_judge()))
        save_state(folder, tensors, {"step": self.step, "kind": "codec"})

    def _named_judge(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{_JUDGE}{name}", parameter) for name, parameter in self.judge.named_parameters()]

    def learn(self, batch: CodecBatch) -> dict[str, float]:
        """One step on one batch. Returns the losses it saw."""
        preset = self.preset
        for group in (*self.optimizer.param_groups, *self.judge_optimizer.param_groups):
            group["lr"] = self._rate()
        batch = CodecBatch(*(tensor.to(self.device) for tensor in batch))
        quantised = None
        if self.step >= preset.quantise_from:
            self._begin_codebooks()
            share = 1.0 if self.frozen else 0.5
            quantised = (torch.rand(len(batch.audio), generator=self._generator) < share).to(self.device)
        output, seen = self.trainer(batch.audio, quantised)
        losses = self._reconstruction(output, seen, batch)
        total = self._weighted(losses)
        if self.judging:
            total = preset.reconstruction_weight * total + self._adversarial(output, batch.audio, losses)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        norm = nn.utils.clip_grad_norm_(self.trainer.parameters(), 5.0)
        self.optimizer.step()
        figures = {name: float(value.detach()) for name, value in losses.items()} | {"grad": float(norm)}
        if seen is not None and not self.frozen:
            figures["dead"] = codebooks.update(self.trainer.mimi.quantizer, seen, self._generator)
        self.step += 1
        return figures

    def _begin_codebooks(self) -> None:
        quantizer = self.trainer.mimi.quantizer
        if bool(quantizer.codebooks()[0]._initialized.any()):
            return
        rngs = [np.random.default_rng([self.seed, 1, number]) for number in range(_FIRST_LATENTS)]
        heard = [draw(self.speech, self.preset.batch, self.preset.frames, rng).audio for rng in rngs]
        with torch.no_grad():
            latents = [self.trainer.mimi.encode_latent(audio.to(self.device).unsqueeze(1)) for audio in heard]
        codebooks.initialise(quantizer, torch.cat(latents), self._generator)

    def _reconstruction(self, output: Tensor, seen: Quantized | None, batch: CodecBatch) -> dict[str, Tensor]:
        losses = {
            "mel": self.mel(output, batch.audio),
            "envelope": self.mel.envelope(output, batch.audio),
            "wave": F.l1_loss(output, batch.audio),
        }
        if seen is not None and not self.frozen:
            commit = [F.mse_loss(value, entry) for value, entry in zip(seen.inputs, seen.entries, strict=True)]
            losses["commit"] = torch.stack(commit).mean()
            losses["semantic"] = self.trainer.semantic_loss(seen, batch)
        return losses

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        preset = self.preset
        weights = {
            "mel": 1.0,
            "envelope": preset.envelope_weight,
            "wave": preset.wave_weight,
            "commit": preset.commit_weight,
            "semantic": preset.semantic_weight,
        }
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

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
        """Mel distance through the quantizer and the least used codebook's share, on fixed unseen crops."""
        self.trainer.eval()
        distances, envelopes, codes = [], [], []
        for number in range(12):
            audio = draw(speech, 4, 48, np.random.default_rng([1, number])).audio.to(self.device)
            output, seen = self.trainer(audio, torch.ones(4, dtype=torch.bool, device=self.device))
            assert seen is not None
            distances.append(float(self.mel(output, audio)))
            envelopes.append(float(self.mel.envelope(output, audio)))
            codes.append(seen.codes.flatten(0, 1).cpu())
        self.trainer.train()
        use = codebooks.use_of(torch.cat(codes), codec_model.CONFIG.quantizer.bins)
        return {
            "val_mel": float(np.mean(distances)),
            "val_envelope": float(np.mean(envelopes)),
            "val_use_min": min(use),
            "val_use_first": use[0],
        }


def train(preset: CodecPreset, folder: Path, pcm: Path, piece: Piece, device: torch.device, seed: int = 5) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    speech, unseen, log = PackedSpeech(pcm, "train"), PackedSpeech(pcm, "val"), Log(folder / "log.jsonl")
    marker = folder / FROZEN
    run = CodecRun(preset, speech, device, seed, int(marker.read_text()) if marker.exists() else None)
    run.load(folder)
    run.trainer.train()
    ticked, audio_s = time.monotonic(), 0.0
    stream = batches(speech, preset.batch, preset.frames, seed, run.step)
    for batch in stream:
        if run.step >= run.last_step or piece.over():
            break
        figures = run.learn(batch)
        audio_s += preset.batch * preset.frames * FRAME_SAMPLES / SAMPLE_RATE
        if run.step % 20 == 0:
            rate = audio_s / (time.monotonic() - ticked)
            log.write(step=run.step, audio_per_s=round(rate, 2), **figures)
            progress(run.step, run.last_step, f"{rate:.1f} x real time", figures)
            ticked, audio_s = time.monotonic(), 0.0
        if run.step % preset.validate_every == 0 and run.step >= preset.quantise_from:
            log.write(step=run.step, **run.validate(unseen))
        if piece.due():
            run.save(folder)
    stream.close()
    run.save(folder)
    print(f"\nat step {run.step} of {run.last_step}; state in {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of this piece; 0: until the run is done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=state_folder() / "codec")
    parser.add_argument("--pcm", type=Path, default=state_folder() / "pcm")
    arguments = parser.parse_args()
    piece, device = start(arguments.minutes, arguments.threads)
    train(PRESETS[arguments.preset], arguments.folder, arguments.pcm, piece, device)


if __name__ == "__main__":
    main()

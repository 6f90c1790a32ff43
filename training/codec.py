"""Trains the codec: `python -m training.codec --minutes 30`; the same command again goes on.

The model is the served one (models/mimi.py). Phase one, here: reconstruction (log-mel at four scales and waveform
L1), codebooks by moving averages, half the crops unquantised as the published Mimi has it, the first codebook
distilled from a speech encoder. Runs on torch, numpy and safetensors alone.
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

from models.config import FRAME_SAMPLES, MimiConfig
from models.demo_checkpoint import MIMI, random_mimi
from models.mimi import Mimi
from models.mimi_quantizer import Quantized
from training import codebooks
from training.codec_data import CodecBatch, PackedSpeech, batches, draw
from training.codec_losses import MelLoss
from training.optim import adamw, learning_rate, pack_moments, unpack_moments, without_moments
from training.piece import Piece, progress, start
from training.state import Log, load_state, save_state, state_folder

# The published context is 10 s; a model trained on crops of three seconds looks back that far, so that no position
# it meets when served is one it never met in training. And codebooks of 32 dimensions, not 128: in 128, entries
# placed at one input are almost never nearest to another, and seven codebooks removed half of the variance.
CONFIG = dataclasses.replace(
    MIMI,
    transformer=dataclasses.replace(MIMI.transformer, context=64),
    quantizer=dataclasses.replace(MIMI.quantizer, dimension=32),
)
_FIRST_LATENTS = 48  # batches the codebooks' first entries are drawn from


@dataclass(frozen=True)
class CodecPreset:
    batch: int
    frames: int  # of a crop
    steps: int
    peak: float
    warmup: int = 500
    quantise_from: int = 400  # steps; before that the latent has no shape worth quantising
    wave_weight: float = 2.0
    commit_weight: float = 0.2
    semantic_weight: float = 0.5
    validate_every: int = 500


PRESETS = {
    "cpu": CodecPreset(batch=4, frames=36, steps=40_000, peak=6e-4),
    "cuda": CodecPreset(batch=64, frames=48, steps=12_000, peak=1e-3),
}


class CodecTrainer(nn.Module):
    """The codec and what training adds to it: a projection for distillation."""

    def __init__(self, config: MimiConfig, features: int) -> None:
        super().__init__()
        self.mimi = Mimi(config)
        # torch's default convolutions lose variance at every layer: from them, the latent stayed constant for
        # hundreds of steps. These weights keep it near one.
        self.mimi.load_state_dict(random_mimi(config))
        for codebook in self.mimi.quantizer.codebooks():
            codebook._initialized.zero_()
        self.semantic = nn.Conv1d(config.seanet.dimension, features, 1)

    def forward(self, audio: Tensor, quantised: Tensor | None, *, half: bool) -> tuple[Tensor, Quantized | None]:
        """audio [batch, samples] → reconstruction [batch, samples] fp32 and what the quantizer saw.

        quantised [batch] bool: crops that go through the quantizer; None before it is in use. half: bf16 autocast
        in the convolutions; the transformers' rotation is complex arithmetic, which has no bf16.
        """
        mimi, device = self.mimi, audio.device.type
        with torch.autocast(device, torch.bfloat16, enabled=half):
            hidden = mimi.encoder(audio.unsqueeze(1))
        hidden = mimi.encoder_transformer(hidden.float().transpose(1, 2)).transpose(1, 2)
        latent: Tensor = mimi.downsample(hidden)
        seen: Quantized | None = None
        if quantised is not None:
            seen = mimi.quantizer(latent)
            latent = torch.where(quantised.view(-1, 1, 1), seen.latent, latent)
        hidden = mimi.decoder_transformer(mimi.upsample(latent).transpose(1, 2)).transpose(1, 2)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            output = mimi.decoder(hidden)
        return output.float().squeeze(1), seen

    def semantic_loss(self, seen: Quantized, batch: CodecBatch) -> Tensor:
        """One minus the cosine between the first codebook's output and the speech encoder's features."""
        split = self.mimi.quantizer.rvq_first
        entry, target = seen.entries[0], seen.inputs[0]
        passed = target + (entry - target).detach()
        frames = batch.semantic.shape[1]
        projected = split.output_proj(passed.view(-1, frames, passed.shape[1]).transpose(1, 2))
        heard = self.semantic(projected).transpose(1, 2)
        distance = 1.0 - F.cosine_similarity(heard, batch.semantic, dim=-1)
        weight = batch.spoken.float().unsqueeze(1).expand_as(distance)
        return (distance * weight).sum() / weight.sum().clamp(min=1.0)


def train(preset: CodecPreset, folder: Path, pcm: Path, piece: Piece, device: torch.device, seed: int = 5) -> None:
    """One piece of the run: resumes from `folder`, trains until the piece is over, leaves state and log there."""
    speech, validation = PackedSpeech(pcm, "train"), PackedSpeech(pcm, "val")
    torch.manual_seed(seed)
    trainer = CodecTrainer(CONFIG, speech.features).to(device)
    mel = MelLoss().to(device)
    optimizer = adamw(trainer, betas=(0.8, 0.99), weight_decay=1e-3)
    named = list(trainer.named_parameters())
    step = 0
    if (saved := load_state(folder)) is not None:
        trainer.load_state_dict(without_moments(saved[0]))
        step = int(saved[1]["step"])
        unpack_moments(optimizer, named, saved[0], step)
    log = Log(folder / "log.jsonl")
    generator = torch.Generator().manual_seed(seed + step)
    half = True  # on a CPU bf16 autocast was a tenth faster, and fp32 no better

    def save() -> None:
        save_state(folder, {**trainer.state_dict(), **pack_moments(optimizer, named)}, {"step": step, "kind": "codec"})

    ticked, ticked_step = time.monotonic(), step
    trainer.train()
    stream = batches(speech, preset.batch, preset.frames, seed, step)
    for batch in stream:
        if step >= preset.steps or piece.over():
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=preset.peak, warmup=preset.warmup, total=preset.steps)
        batch = CodecBatch(*(tensor.to(device) for tensor in batch))
        in_use = step >= preset.quantise_from
        if in_use and not bool(trainer.mimi.quantizer.codebooks()[0]._initialized.any()):
            numbers = [np.random.default_rng([seed, 1, number]) for number in range(_FIRST_LATENTS)]
            heard = [draw(speech, preset.batch, preset.frames, rng).audio.to(device) for rng in numbers]
            with torch.no_grad():
                latents = torch.cat([trainer.mimi.encode_latent(audio.unsqueeze(1)) for audio in heard])
            codebooks.initialise(trainer.mimi.quantizer, latents, generator)
        quantised = torch.rand(preset.batch, generator=generator) < 0.5 if in_use else None
        output, seen = trainer(batch.audio, quantised.to(device) if quantised is not None else None, half=half)
        losses = {"mel": mel(output, batch.audio), "wave": F.l1_loss(output, batch.audio)}
        total = losses["mel"] + preset.wave_weight * losses["wave"]
        replaced = 0
        if seen is not None:
            commit = [F.mse_loss(value, entry) for value, entry in zip(seen.inputs, seen.entries, strict=True)]
            losses["commit"] = torch.stack(commit).mean()
            losses["semantic"] = trainer.semantic_loss(seen, batch)
            total = total + preset.commit_weight * losses["commit"] + preset.semantic_weight * losses["semantic"]
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        norm = nn.utils.clip_grad_norm_(trainer.parameters(), 5.0)
        optimizer.step()
        if seen is not None:
            replaced = codebooks.update(trainer.mimi.quantizer, seen, generator)
        step += 1
        if step % 20 == 0:
            spent = time.monotonic() - ticked
            audio_s = (step - ticked_step) * preset.batch * preset.frames * FRAME_SAMPLES / 24_000
            figures = {name: float(value.detach()) for name, value in losses.items()}
            log.write(step=step, grad=float(norm), dead=replaced, audio_per_s=round(audio_s / spent, 2), **figures)
            progress(step, preset.steps, f"{audio_s / spent:.1f} x real time", figures)
            ticked, ticked_step = time.monotonic(), step
        if step % preset.validate_every == 0:
            log.write(step=step, **validate(trainer, mel, validation, device))
        if piece.due():
            save()
    stream.close()
    save()
    print(f"\nat step {step} of {preset.steps}; state in {folder}", flush=True)


@torch.no_grad()
def validate(trainer: CodecTrainer, mel: MelLoss, speech: PackedSpeech, device: torch.device) -> dict[str, float]:
    """Mel distance through the quantizer and the least used codebook's share, on fixed unseen crops."""
    trainer.eval()
    distances, codes = [], []
    for number in range(12):
        batch = draw(speech, 4, 48, np.random.default_rng([1, number]))
        audio = batch.audio.to(device)
        output, seen = trainer(audio, torch.ones(4, dtype=torch.bool, device=device), half=False)
        assert seen is not None
        distances.append(float(mel(output, audio)))
        codes.append(seen.codes.flatten(0, 1).cpu())
    trainer.train()
    use = codebooks.use_of(torch.cat(codes), CONFIG.quantizer.bins)
    return {"val_mel": float(np.mean(distances)), "val_use_min": min(use), "val_use_first": use[0]}


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

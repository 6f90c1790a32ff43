"""The codec with what training adds to it: the shape that is trained, and a forward pass with gradients."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import MimiConfig
from models.demo_checkpoint import MIMI, random_mimi
from models.mimi import Mimi
from models.mimi_quantizer import Quantized
from training.codec_data import CodecBatch

# The published context is 10 s; a model trained on crops of three seconds looks back that far, so that no position
# it meets when served is one it never met in training. And codebooks of 32 dimensions, not 128: in 128, entries
# placed at one input are almost never nearest to another, and seven codebooks removed half of the variance.
CONFIG = dataclasses.replace(
    MIMI,
    transformer=dataclasses.replace(MIMI.transformer, context=64),
    quantizer=dataclasses.replace(MIMI.quantizer, dimension=32),
)


# What decides the codes. Once a language model learns them, these stay as they are, and only what turns codes back
# into sound goes on learning.
_HEARING = ("encoder.", "encoder_transformer.", "downsample.")


def hears(name: str) -> bool:
    """Whether a tensor of Mimi's decides which codes come out."""
    return name.startswith(_HEARING) or "input_proj" in name or "_codebook." in name


def hearing_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of what decides the codes, at the precision it ships in; weights by Mimi's names."""
    content = hashlib.blake2b(digest_size=8)
    for name in sorted(filter(hears, weights)):
        content.update(name.encode())
        content.update(weights[name].detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return content.hexdigest()


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

    def freeze_hearing(self) -> None:
        """Leaves the codes as they are from now on: only the way back to sound learns."""
        for name, parameter in self.mimi.named_parameters():
            parameter.requires_grad_(not hears(name))
        self.semantic.requires_grad_(False)

    def forward(self, audio: Tensor, quantised: Tensor | None) -> tuple[Tensor, Quantized | None]:
        """audio [batch, samples] → reconstruction [batch, samples] fp32 and what the quantizer saw.

        quantised [batch] bool: crops that go through the quantizer; None before it is in use. In fp32 (TF32 on a
        GPU): bf16's rounding of a loud low sound is as loud as the quiet high ones, and the loss is logarithmic.
        """
        mimi = self.mimi
        latent = mimi.encode_latent(audio.unsqueeze(1))
        seen: Quantized | None = None
        if quantised is not None:
            seen = mimi.quantizer(latent)
            latent = torch.where(quantised.view(-1, 1, 1), seen.latent, latent)
        return mimi.decode_latent(latent).squeeze(1), seen

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

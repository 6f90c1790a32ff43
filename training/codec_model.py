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
from models.mimi_transformer import POSITIONS_PER_FRAME
from training.spectrogram import WIDTH

# The published context is 10 s; a model trained on crops of three seconds looks back that far, so that no position
# it meets when served is one it never met in training. Codebooks of 64 dimensions: with as many bits, what codes tell
# of columns is off by 0.308 nats in 64 and by 0.321 in 32, which leave details out that codes could have told.
CONFIG = dataclasses.replace(
    MIMI,
    transformer=dataclasses.replace(MIMI.transformer, context=64),
    quantizer=dataclasses.replace(MIMI.quantizer, dimension=64),
)


# What decides the codes, and does not learn with the decoder.
_ENCODER = ("encoder.", "encoder_transformer.", "downsample.")


def encodes(name: str) -> bool:
    """Whether a tensor of Mimi's belongs to its encoder."""
    return name.startswith(_ENCODER)


def hears(name: str) -> bool:
    """Whether a tensor of Mimi's decides which codes come out."""
    return encodes(name) or "input_proj" in name or "_codebook." in name


def codes_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of all that decides which codes a sound has, at the precision it ships in; weights by Mimi's names.

    The encoder belongs to it: one that has learnt more finds codes of the same meaning, but other ones (of 1,200 steps
    more, a third of the first codebook's and most of the last ones'), and a language model speaks those it learnt.
    """
    content = hashlib.blake2b(digest_size=8)
    for name in sorted(name for name in weights if hears(name)):
        content.update(name.encode())
        content.update(weights[name].detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return content.hexdigest()


class CodecTrainer(nn.Module):
    """The codec with its codes as they are, and a linear reading of its decoder's transformer for training."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.mimi = Mimi(config)
        # torch's default convolutions lose variance at every layer. These weights keep it near one.
        self.mimi.load_state_dict(random_mimi(config))
        for name, parameter in self.mimi.named_parameters():
            parameter.requires_grad_(not hears(name))
        # A position of the transformer's stands for half a frame. Where the widths agree its output begins as the
        # columns themselves.
        self.columns = nn.Linear(config.transformer.d_model, WIDTH // POSITIONS_PER_FRAME)
        nn.init.eye_(self.columns.weight)
        nn.init.zeros_(self.columns.bias)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """audio [batch, samples] → reconstruction [batch, samples] and columns [batch, frames, WIDTH], fp32.

        In fp32 (TF32 on a GPU): bf16's rounding of a loud low sound is as loud as the quiet high ones.
        """
        mimi = self.mimi
        with torch.no_grad():
            latent = mimi.encode_latent(audio.unsqueeze(1))
            codes = mimi.quantizer.encode(latent.transpose(1, 2).flatten(0, 1))
        x = mimi.upsample(self.dequantise(codes).view(len(audio), -1, latent.shape[1]).transpose(1, 2))
        x = mimi.decoder_transformer(x.transpose(1, 2))
        columns = self.columns(x).view(len(audio), -1, WIDTH)
        return mimi.decoder(x.transpose(1, 2)).squeeze(1), columns

    def dequantise(self, codes: Tensor) -> Tensor:
        """codes [rows, codebooks] → [rows, dim]; differentiable in the projections."""
        quantizer = self.mimi.quantizer
        entries = [book.entries()[codes[:, index]] for index, book in enumerate(quantizer.codebooks())]
        semantic, acoustic = entries[0], torch.stack(entries[1:]).sum(0)
        project = [split.output_proj.weight[:, :, 0] for split in (quantizer.rvq_first, quantizer.rvq_rest)]
        return F.linear(semantic, project[0]) + F.linear(acoustic, project[1])

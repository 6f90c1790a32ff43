"""The codec's second phase: discriminators on spectrograms at several scales, hinge losses and feature matching.

As EnCodec has it (Défossez et al. 2022), smaller. Reconstruction losses alone leave what they cannot predict out;
a discriminator makes the decoder put something plausible there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SCALES = (2048, 1024, 512)


class Heard(NamedTuple):
    """What one discriminator makes of a sound: its verdicts and the layers before them."""

    verdicts: Tensor  # [batch, 1, frames, bands], high for real
    features: tuple[Tensor, ...]


class SpectrogramDiscriminator(nn.Module):
    """2-d convolutions over a complex spectrogram, dilated in time, striding over frequency."""

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        shapes = [(2, 1, 1), (channels, 2, 1), (channels, 2, 2), (channels, 2, 4), (channels, 1, 1)]
        self.layers = nn.ModuleList(
            weight_norm(
                nn.Conv2d(inputs, channels, (3, 9), stride=(1, stride), dilation=(dilation, 1), padding=(dilation, 4))
            )
            for inputs, stride, dilation in shapes
        )
        self.last = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Heard:
        """x [batch, samples] fp32."""
        spectrum = torch.stft(
            x, self.window, self.window // 4, window=self.get_buffer("hann"), normalized=True, return_complex=True
        )
        h = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # [batch, 2, frames, bands]
        features = []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
            features.append(h)
        return Heard(self.last(h), tuple(features))


class Discriminators(nn.Module):
    """One for each scale."""

    def __init__(self, channels: int = 24, scales: tuple[int, ...] = SCALES) -> None:
        super().__init__()
        self.scales = nn.ModuleList(SpectrogramDiscriminator(window, channels) for window in scales)

    def forward(self, x: Tensor) -> list[Heard]:
        return [scale(x) for scale in self.scales]


def discriminator_loss(real: list[Heard], made: list[Heard]) -> Tensor:
    """Hinge: real sounds above 1, made ones below -1. Two where the discriminators know nothing."""
    losses = [
        F.relu(1.0 - r.verdicts).mean() + F.relu(1.0 + m.verdicts).mean() for r, m in zip(real, made, strict=True)
    ]
    return torch.stack(losses).mean()


def generator_losses(real: list[Heard], made: list[Heard]) -> tuple[Tensor, Tensor]:
    """(adversarial, feature matching): verdicts to be raised, and features' distance relative to their size."""
    verdicts = torch.stack([-m.verdicts.mean() for m in made]).mean()
    distances = [
        F.l1_loss(ours, theirs.detach()) / theirs.detach().abs().mean().clamp(min=1e-4)
        for r, m in zip(real, made, strict=True)
        for ours, theirs in zip(m.features, r.features, strict=True)
    ]
    return verdicts, torch.stack(distances).mean()

"""Speech as the columns of a spectrogram: what the encoder learns to hear and the decoder to say, in plain numbers.

64 log-mel bands every 10 ms, eight columns a frame. 32 principal components of a frame's columns are enough to be
understood (5 % word errors by way of Griffin-Lim, voice similarity .87), 16 are not (18 %, .74): `training/README.md`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config import FRAME_SAMPLES, SAMPLE_RATE

BANDS = 64
HOP = 240  # samples: 10 ms
WINDOW = 1024
PER_FRAME = FRAME_SAMPLES // HOP
WIDTH = BANDS * PER_FRAME  # numbers a frame
_FLOOR = 1e-3  # -60 dB below a full-scale noise: digital silence and a quiet room are alike
_MIDDLE, NATS = -4.0, 2.0  # columns are near zero mean and unit variance; one unit is two nats
_PHASE_MOMENTUM = 0.5


def mel_filters(bands: int, bins: int, rate: int = SAMPLE_RATE) -> Tensor:
    """Triangular filters [bands, bins] on the HTK mel scale, each of unit area over its band."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges = torch.linspace(mel(30.0), mel(rate / 2), bands + 2)
    hertz = 700.0 * (10.0 ** (edges / 2595.0) - 1.0)
    frequency = torch.linspace(0, rate / 2, bins)
    rising = (frequency - hertz[:-2, None]) / (hertz[1:-1] - hertz[:-2])[:, None]
    falling = (hertz[2:, None] - frequency) / (hertz[2:] - hertz[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return filters / filters.sum(1, keepdim=True).clamp(min=1e-6)


def columns(audio: Tensor) -> Tensor:
    """audio [batch, frames * 1920] fp32 in -1 … 1 → [batch, frames, WIDTH]."""
    window = torch.hann_window(WINDOW, device=audio.device)
    spectrum = torch.stft(audio, WINDOW, HOP, window=window, return_complex=True)[..., : audio.shape[1] // HOP]
    # White noise of amplitude a has magnitude a in every band, whatever the window.
    magnitude = spectrum.abs() / window.square().sum().sqrt()
    bands = torch.matmul(mel_filters(BANDS, WINDOW // 2 + 1).to(audio.device), magnitude)
    level = (torch.log(bands + _FLOOR) - _MIDDLE) / NATS
    return level.transpose(1, 2).reshape(audio.shape[0], -1, WIDTH)


@torch.no_grad()
def sound(heard: Tensor, *, rounds: int = 32) -> Tensor:
    """Columns [batch, frames, WIDTH] → audio [batch, frames * 1920] of phases that fit (Griffin & Lim 1984, with
    the momentum of Perraudin et al. 2013): rough, but what columns hold can be understood without a decoder."""
    window = torch.hann_window(WINDOW)
    filters = mel_filters(BANDS, WINDOW // 2 + 1)
    level = heard.reshape(heard.shape[0], -1, BANDS).transpose(1, 2) * NATS + _MIDDLE
    bands = (level.exp() - _FLOOR).clamp(min=0.0) * window.square().sum().sqrt()
    magnitude = torch.matmul(torch.linalg.pinv(filters), bands).clamp(min=1e-5)
    # One column more than the audio has hops: the inverse ends with a whole window.
    magnitude = torch.cat([magnitude, magnitude[..., -1:]], dim=-1)
    generator = torch.Generator().manual_seed(0)
    phase = torch.exp(2j * math.pi * torch.rand(magnitude.shape, generator=generator))
    before = torch.zeros_like(phase)
    samples = heard.shape[1] * FRAME_SAMPLES
    for _ in range(rounds):
        audio = torch.istft(magnitude * phase, WINDOW, HOP, window=window, length=samples)
        now = torch.stft(audio, WINDOW, HOP, window=window, return_complex=True)
        fitted = now - _PHASE_MOMENTUM * before
        before, phase = now, fitted / (fitted.abs() + 1e-9)
    return torch.istft(magnitude * phase, WINDOW, HOP, window=window, length=samples)

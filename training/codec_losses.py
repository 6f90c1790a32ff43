"""How far a reconstruction is from the original: mel spectrograms at several scales, and loud parts once more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.spectrogram import mel_filters

# Window lengths and mel bands: short windows place onsets, long ones resolve harmonics (Yamamoto et al. 2020).
SCALES = ((256, 32), (512, 64), (1024, 80), (2048, 128))
# -60 dB below a full-scale noise. A logarithm's gradient is one over the level: with a floor below the noise of
# 16 bits, 84 % of the gradient came from the fifth of the samples that is silence, and 1 % from loud speech.
_FLOOR = 1e-3
_ROOT_FLOOR = 1e-4


class SpectralLoss(nn.Module):
    """Two distances of mel magnitudes, means over several window lengths.

    Of logarithms: squared up to a nat, absolute beyond, so that what is nearly right (silence, mostly) asks for
    little. Of square roots, squared: there loud parts decide, as they do for the ear.
    """

    def __init__(self, scales: tuple[tuple[int, int], ...] = SCALES) -> None:
        super().__init__()
        self.scales = scales
        for window, bands in scales:
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"filters_{window}", mel_filters(bands, window // 2 + 1), persistent=False)

    def magnitude(self, x: Tensor, window: int) -> Tensor:
        """x [batch, samples] fp32 → [batch, bands, frames]; white noise of amplitude a has a in every band."""
        hann = self.get_buffer(f"window_{window}")
        spectrum = torch.stft(x, window, window // 4, window=hann, center=True, return_complex=True)
        # The root's gradient is infinite at zero, where a digital silence is.
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
        return torch.matmul(self.get_buffer(f"filters_{window}"), magnitude) / hann.square().sum().sqrt()

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Both [batch, samples] fp32 → (of logarithms in nats, of square roots), scalars."""
        logs, roots = [], []
        for window, _ in self.scales:
            ours, theirs = self.magnitude(output, window), self.magnitude(target, window)
            logs.append(F.smooth_l1_loss(torch.log(ours + _FLOOR), torch.log(theirs + _FLOOR)))
            roots.append(F.mse_loss(torch.sqrt(ours + _ROOT_FLOOR), torch.sqrt(theirs + _ROOT_FLOOR)))
        return torch.stack(logs).mean(), torch.stack(roots).mean()

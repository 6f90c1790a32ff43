"""How far a reconstruction is from the original: waveform L1 and mel spectrograms at several scales."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import SAMPLE_RATE

# Window lengths and mel bands: short windows place onsets, long ones resolve harmonics (Yamamoto et al. 2020).
SCALES = ((256, 32), (512, 64), (1024, 80), (2048, 128))
# (window, mel bands, frames averaged): formants and onsets without the fine structure in between. Half of the distance
# above is fine structure no code of a kilobit a second can say: noise shaped by the true envelope is at 0.60, and a
# codec whose formants were still a blur at 0.70. Averaged energies leave the gradient to the formants.
ENVELOPES = ((512, 32, 6), (1024, 48, 4))
_ENVELOPE_FLOOR = 1e-2  # of magnitude: in near silence a smaller one gave gradients a hundred times the usual
_FLOOR = 1e-4  # below the level that int16 dither has in a band; its logarithm would only be noise


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


class MelLoss(nn.Module):
    """Mean absolute difference of log-mel magnitudes over several window lengths."""

    def __init__(self, scales: tuple[tuple[int, int], ...] = SCALES) -> None:
        super().__init__()
        self.scales = scales
        for window, bands in scales:
            self.register_buffer(f"window_{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"filters_{window}", mel_filters(bands, window // 2 + 1), persistent=False)
        for window, bands, _ in ENVELOPES:
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)
            self.register_buffer(f"bands_{window}", mel_filters(bands, window // 2 + 1), persistent=False)

    def envelope(self, output: Tensor, target: Tensor) -> Tensor:
        """The same of mel energies averaged over some 40 ms; both [batch, samples] fp32 → a scalar."""
        losses = []
        for window, _, frames in ENVELOPES:
            ours, theirs = (self._log_energy(x, window, frames) for x in (output, target))
            losses.append(F.l1_loss(ours, theirs))
        return torch.stack(losses).mean()

    def _log_energy(self, x: Tensor, window: int, frames: int) -> Tensor:
        """[batch, bands, periods], in nats of magnitude as `log_mel`."""
        hann = self.get_buffer(f"hann_{window}")
        spectrum = torch.stft(x, window, window // 4, window=hann, center=True, return_complex=True)
        energy = spectrum.real.square() + spectrum.imag.square()
        bands = torch.matmul(self.get_buffer(f"bands_{window}"), energy)
        return 0.5 * torch.log(F.avg_pool1d(bands, frames, frames // 2) + _ENVELOPE_FLOOR**2)

    def log_mel(self, x: Tensor, window: int) -> Tensor:
        """x [batch, samples] fp32 → [batch, bands, frames]."""
        spectrum = torch.stft(
            x, window, window // 4, window=self.get_buffer(f"window_{window}"), center=True, return_complex=True
        )
        # The root's gradient is infinite at zero, where a digital silence is.
        magnitude = torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-9)
        return torch.log(torch.matmul(self.get_buffer(f"filters_{window}"), magnitude) + _FLOOR)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Both [batch, samples] fp32 → a scalar."""
        losses = [F.l1_loss(self.log_mel(output, window), self.log_mel(target, window)) for window, _ in self.scales]
        return torch.stack(losses).mean()

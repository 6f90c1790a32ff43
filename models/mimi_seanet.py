"""The codec's convolutional encoder and decoder: 24 kHz samples ↔ vectors at 25 Hz."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from models.config import SeanetConfig
from models.mimi_conv import CausalConv1d, CausalConvTranspose1d
from models.slot_state import SlotState


class ResidualBlock(nn.Module):
    """`x + conv1(ELU(conv3(ELU(x))))` with a narrower hidden layer; parameters below `block.1` and `block.3`."""

    def __init__(self, channels: int, config: SeanetConfig) -> None:
        super().__init__()
        hidden = channels // config.compress
        self.block = nn.ModuleList(
            [
                nn.ELU(),
                CausalConv1d(channels, hidden, config.residual_kernel_size),
                nn.ELU(),
                CausalConv1d(hidden, channels, 1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, time] → the same; differentiable."""
        h = x
        for module in self.block:
            h = module(h)
        return x + h

    def step(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, time, channels] → the same."""
        wide, narrow = cast(CausalConv1d, self.block[1]), cast(CausalConv1d, self.block[3])
        h = wide.step(F.elu(x), state, active)
        return narrow.step(F.elu_(h), state, active).add_(x)


class Seanet(nn.Module):
    """A stack of convolutions, residual blocks and ELUs; parameters below `model.<position>`."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, time] → [batch, out, time'], from silence; differentiable."""
        for module in self.model:
            x = module(x)
        return x

    def step(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, time, in] → [slots, time', out]."""
        for module in self.model:
            if isinstance(module, (CausalConv1d, CausalConvTranspose1d, ResidualBlock)):
                x = module.step(x, state, active)
            else:
                # What comes before an ELU at this level is read by it alone, so its memory is reused.
                x = F.elu_(x)
        return x


def build_encoder(config: SeanetConfig) -> Seanet:
    """[slots, 1,920, 1] samples → [slots, 2, dimension] a frame."""
    channels = config.n_filters
    modules: list[nn.Module] = [CausalConv1d(1, channels, config.kernel_size)]
    for ratio in reversed(config.ratios):
        modules += [
            ResidualBlock(channels, config),
            nn.ELU(),
            CausalConv1d(channels, 2 * channels, 2 * ratio, ratio),
        ]
        channels *= 2
    modules += [nn.ELU(), CausalConv1d(channels, config.dimension, config.last_kernel_size)]
    return Seanet(modules)


def build_decoder(config: SeanetConfig) -> Seanet:
    """[slots, 2, dimension] → [slots, 1,920, 1] samples a frame."""
    channels = config.n_filters * 2 ** len(config.ratios)
    modules: list[nn.Module] = [CausalConv1d(config.dimension, channels, config.kernel_size)]
    for ratio in config.ratios:
        modules += [
            nn.ELU(),
            CausalConvTranspose1d(channels, channels // 2, 2 * ratio, ratio),
            ResidualBlock(channels // 2, config),
        ]
        channels //= 2
    modules += [nn.ELU(), CausalConv1d(channels, 1, config.last_kernel_size)]
    return Seanet(modules)

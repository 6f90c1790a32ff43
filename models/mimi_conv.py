"""Causal convolutions of the codec: streamed frame by frame for serving, or whole sequences for training.

The streamed form keeps activations as [slots, time, channels], where a convolution's window is one contiguous
run of memory: every convolution, transposed ones too, is one copy of windows and one matrix product. That
beats the convolution kernels at these sizes on a CPU (they reorder weights in every call), and gives a slot
the same bits whatever the other rows hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.slot_state import SlotState

# A product narrower than this wastes most of a vector register: rows of several positions fill it.
_MIN_COLUMNS = 16


class Packed(NamedTuple):
    """A convolution as a matrix: rows of `window` values, one every `hop`, times `weight`, plus `bias`."""

    weight: Tensor  # [window, columns]
    bias: Tensor  # [columns]
    hop: int


class PackedModule(nn.Module):
    """Keeps tensors derived from its parameters, but not while training; `Mimi.unpack` drops them all."""

    _derived: object = None

    def drop_derived(self) -> None:
        self._derived = None


def advance(state: SlotState, name: str, value: Tensor, active: Tensor | None) -> None:
    """Replaces `name` by `value` [slots, …] in the active rows; `active` [slots] bool, None for all."""
    current = state[name]
    if active is None:
        current.copy_(value)
    else:
        # In place and in one pass: this runs some twenty times in every frame.
        torch.where(active.view(-1, *([1] * (current.dim() - 1))), value, current, out=current)


class StreamingConv(PackedModule):
    """What streamed convolutions share: a history of inputs per slot, and the product over windows."""

    def __init__(self, in_channels: int, history: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.history = history  # inputs kept between calls
        self.state_name = ""  # set by whoever owns the whole codec

    def state_shape(self) -> tuple[int, ...]:
        return (self.history, self.in_channels)

    def packed(self) -> Packed:
        if self.training or not isinstance(self._derived, Packed):
            with torch.no_grad():
                self._derived = self._pack()
        assert isinstance(self._derived, Packed)
        return self._derived

    def _pack(self) -> Packed:
        raise NotImplementedError

    def with_history(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """Puts the history before `x` [slots, time, channels] and keeps the end of it for the next call."""
        if self.history == 0:
            return x
        joined = torch.cat([state[self.state_name], x], dim=1)
        advance(state, self.state_name, joined[:, -self.history :], active)
        return joined

    def product(self, joined: Tensor) -> Tensor:
        """[slots, history + time, channels] → [slots, windows, columns]."""
        weight, bias, hop = self.packed()
        slots = joined.shape[0]
        windows = joined.reshape(slots, -1).unfold(1, weight.shape[0], hop)
        rows = windows.reshape(-1, weight.shape[0])
        return torch.addmm(bias, rows, weight).view(slots, -1, weight.shape[1])


class CausalConv1d(StreamingConv):
    """A convolution whose left padding is `kernel - stride`, so that its output never waits for input.

    Parameters are `conv.conv.weight` [out, in, kernel] and `conv.conv.bias` [out].
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, bias: bool = True
    ) -> None:
        super().__init__(in_channels, kernel_size - stride)
        self.out_channels, self.kernel_size, self.stride = out_channels, kernel_size, stride
        self.conv = nn.ModuleDict({"conv": nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)})

    @property
    def inner(self) -> nn.Conv1d:
        return cast(nn.Conv1d, self.conv["conv"])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, time] → [batch, out, time / stride], from silence; differentiable."""
        return F.conv1d(F.pad(x, (self.history, 0)), self.inner.weight, self.inner.bias, self.stride)

    def step(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, time, in] → [slots, time / stride, out]; `time` is the same in every call or a multiple."""
        y = self.product(self.with_history(x, state, active))
        return y.view(x.shape[0], -1, self.out_channels)

    def _pack(self) -> Packed:
        weight = self.inner.weight  # [out, in, kernel]
        positions = self._positions_per_row()
        window = (positions - 1) * self.stride + self.kernel_size
        packed = weight.new_zeros(window, self.in_channels, positions, self.out_channels)
        taps = weight.permute(2, 1, 0)
        for position in range(positions):
            start = position * self.stride
            packed[start : start + self.kernel_size, :, position] = taps
        bias = self.inner.bias if self.inner.bias is not None else weight.new_zeros(self.out_channels)
        hop = positions * self.stride * self.in_channels
        return Packed(packed.reshape(window * self.in_channels, -1), bias.repeat(positions), hop)

    def _positions_per_row(self) -> int:
        """Output positions one row computes, a power of two: the extra products cost less than narrow ones."""
        if self.stride > 1 or self.kernel_size == 1:
            return 1
        positions = 1
        while positions * self.out_channels < _MIN_COLUMNS:
            positions *= 2
        return positions


class CausalConvTranspose1d(StreamingConv):
    """An upsampling convolution, trimmed by `kernel - stride` on the right.

    Parameters are `convtr.convtr.weight` [in, out, kernel] and `convtr.convtr.bias` [out]. Streamed, `stride`
    outputs are a function of the last `kernel / stride` inputs, so it is a plain convolution over those.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        if kernel_size % stride:
            raise ValueError(f"a streamed upsampling needs kernel % stride == 0, got {kernel_size} and {stride}")
        super().__init__(in_channels, kernel_size // stride - 1)
        self.out_channels, self.kernel_size, self.stride = out_channels, kernel_size, stride
        self.convtr = nn.ModuleDict({"convtr": nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride)})

    @property
    def inner(self) -> nn.ConvTranspose1d:
        return cast(nn.ConvTranspose1d, self.convtr["convtr"])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, time] → [batch, out, time * stride]; differentiable."""
        y = F.conv_transpose1d(x, self.inner.weight, self.inner.bias, self.stride)
        return y[..., : x.shape[-1] * self.stride]

    def step(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, time, in] → [slots, time * stride, out]."""
        y = self.product(self.with_history(x, state, active))
        return y.view(x.shape[0], -1, self.out_channels)

    def _pack(self) -> Packed:
        taps = self.inner.weight.view(self.in_channels, self.out_channels, -1, self.stride)
        # The newest input meets the first `stride` taps: the window's last inputs come first in the kernel.
        weight = taps.flip(2).permute(2, 0, 3, 1).reshape((self.history + 1) * self.in_channels, -1)
        assert self.inner.bias is not None
        return Packed(weight.contiguous(), self.inner.bias.repeat(self.stride), self.in_channels)


class Downsample(nn.Module):
    """Halves the frame rate. The first frame of a stream is padded with copies of its own first vector.

    Parameter: `conv.conv.conv.weight` [dim, dim, kernel].
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = CausalConv1d(dim, dim, 2 * stride, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, time] → [batch, dim, time / stride]; differentiable."""
        padded = F.pad(x, (self.conv.history, 0), mode="replicate")
        return F.conv1d(padded, self.conv.inner.weight, stride=self.conv.stride)

    def step(self, x: Tensor, state: SlotState, fresh: Tensor, active: Tensor | None) -> Tensor:
        """[slots, time, dim] → [slots, time / stride, dim]; `fresh` [slots] bool marks a stream's first frame."""
        name = self.conv.state_name
        history = torch.where(fresh.view(-1, 1, 1), x[:, :1], state[name])
        joined = torch.cat([history, x], dim=1)
        advance(state, name, joined[:, -self.conv.history :], active)
        return self.conv.product(joined)


class Upsample(StreamingConv):
    """Doubles the frame rate with one filter per channel.

    Parameter: `convtr.convtr.convtr.weight` [dim, 1, kernel].
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__(dim, 1)
        self.dim, self.stride = dim, stride
        convtr = nn.ConvTranspose1d(dim, dim, 2 * stride, stride, groups=dim, bias=False)
        self.convtr = nn.ModuleDict({"convtr": nn.ModuleDict({"convtr": convtr})})

    @property
    def inner(self) -> nn.ConvTranspose1d:
        return cast(nn.ConvTranspose1d, cast(nn.ModuleDict, self.convtr["convtr"])["convtr"])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim, time] → [batch, dim, time * stride]; differentiable."""
        y = F.conv_transpose1d(x, self.inner.weight, stride=self.stride, groups=self.dim)
        return y[..., : x.shape[-1] * self.stride]

    def step(self, x: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, time, dim] → [slots, time * stride, dim]."""
        newest, before = self.packed().weight.unbind(0)
        joined = self.with_history(x, state, active)
        y = torch.addcmul(joined[:, 1:, None] * newest, joined[:, :-1, None], before)
        return y.view(x.shape[0], -1, self.dim)

    def _pack(self) -> Packed:
        taps = self.inner.weight.view(self.dim, 2, self.stride).permute(1, 2, 0).contiguous()
        return Packed(taps, taps.new_zeros(0), self.dim)


def streaming_convs(module: nn.Module) -> Iterator[tuple[str, StreamingConv]]:
    """Every convolution below `module` that keeps a history, with its path."""
    for name, child in module.named_modules():
        if isinstance(child, StreamingConv) and child.history > 0:
            yield name, child

"""Mimi on a CPU in a few compiled calls a frame: the same weights, the same state, fp32 throughout.

In torch a frame is some 200 operators over buffers that outgrow the cache; here every slot's convolutions run while its
samples are in it, and attention reads the keys that exist and no others. A slot is computed by itself, or as rows of a
product that are independent of each other: what it says does not depend on who else is there. Both directions of 16
slots of the demo codec have 30 ms of the 80.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.compiled import as_array, matmul, pack
from graphs.compiled_codec_layers import (
    Convolution,
    Residual,
    add_bias,
    decoder_back,
    encoder_front,
    entries_of,
    quantize,
    upsample,
    windows,
)
from graphs.compiled_codec_transformer import TransformerWeights, transform
from models.config import FRAME_SAMPLES
from models.mimi import Mimi
from models.mimi_conv import StreamingConv
from models.mimi_seanet import ResidualBlock, Seanet
from models.mimi_transformer import POSITIONS_PER_FRAME, MimiTransformer, rotation
from models.slot_state import SlotState

Floats = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]
_LANES = 16


def fits(mimi: Mimi) -> bool:
    """Whether a codec can be compiled: fp32 on a CPU, with heads that fill a vector."""
    weight = next(mimi.parameters())
    head_dim = mimi.config.transformer.d_model // mimi.config.transformer.num_heads
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and head_dim % _LANES == 0


class _Half:
    """What both directions share: a transformer and windows over all slots' rows."""

    def __init__(self, transformer: MimiTransformer) -> None:
        self._config = transformer.config
        self._head_dim = transformer.head_dim
        self._rings = [f"{transformer.state_name}.{index}" for index in range(transformer.config.num_layers)]
        layers = transformer.layers
        attentions = [layer.self_attn for layer in layers]
        self._transformer = TransformerWeights(
            norm1=_stack(torch.stack([layer.norm1.weight, layer.norm1.bias]) for layer in layers),
            in_proj=np.stack([pack(attention.in_proj_weight) for attention in attentions]),
            out_proj=np.stack([pack(attention.out_proj.weight) for attention in attentions]),
            scale1=_stack(layer.layer_scale_1.scale for layer in layers),
            norm2=_stack(torch.stack([layer.norm2.weight, layer.norm2.bias]) for layer in layers),
            linear1=np.stack([pack(layer.linear1.weight) for layer in layers]),
            linear2=np.stack([pack(layer.linear2.weight) for layer in layers]),
            scale2=_stack(layer.layer_scale_2.scale for layer in layers),
        )

    def _transform(self, x: Floats, state: SlotState, slots: Slots, frames: npt.NDArray[np.int64]) -> None:
        """x [slots, 2 * dim] in place."""
        positions = (frames[:, None] * POSITIONS_PER_FRAME + np.arange(POSITIONS_PER_FRAME)).reshape(-1)
        turn = rotation(torch.from_numpy(positions), self._head_dim, self._config.max_period).squeeze(1)
        rings = tuple(as_array(state[name]) for name in self._rings)
        cosine_and_sine = (turn.real.contiguous().numpy(), turn.imag.contiguous().numpy())
        transform(x.reshape(-1, self._config.d_model), self._transformer, rings, slots, frames, cosine_and_sine)

    def _convolve(
        self, convolution: Convolution, x: Floats, history: Tensor, slots: Slots, *, activate: bool
    ) -> Floats:
        """x [slots, time * channels] → [slots, time' * channels'], all slots' windows in one product."""
        kept, width = as_array(history), x.shape[1]
        length = kept[0].size + width
        rows = (length - convolution.window) // convolution.hop + 1
        out = np.zeros((len(slots) * rows, convolution.weight.shape[1] * 2), dtype=np.float32)
        joined = np.empty(length + 1, dtype=np.float32)
        windows(convolution, x.reshape(-1), width, kept, slots, activate, joined, out)
        return _multiplied(convolution, out, len(slots))


def numbers(frames: Slots, slots: Slots, run: int) -> Slots:
    """Each frame's number, in a call that names every slot `run` times in a row; frames: those of the next ones."""
    now = frames[slots]
    return now if run == 1 else now + np.arange(len(slots)) % run


def _multiplied(convolution: Convolution, rows: Floats, slots: int) -> Floats:
    """Windows [slots * n, inputs] → [slots, n * columns]."""
    y = np.empty((len(rows), len(convolution.bias)), dtype=np.float32)
    matmul(rows, convolution.weight, y)
    add_bias(y.reshape(-1), len(y), convolution.bias)
    return y.reshape(slots, -1)


class CompiledEncoder(_Half):
    """PCM → codes."""

    def __init__(self, mimi: Mimi) -> None:
        super().__init__(mimi.encoder_transformer)
        self._mimi = mimi
        first, *stages, last = _parts(mimi.encoder)
        self._first, self._last = _convolution(first), _convolution(last)
        self._stages = tuple(
            (_residual(block), _convolution(down)) for block, down in zip(stages[::2], stages[1::2], strict=True)
        )
        self._names = [first.state_name, *(name for stage in stages for name in _state_names(stage)), last.state_name]
        self._samples = FRAME_SAMPLES * mimi.config.seanet.n_filters
        down = mimi.downsample.conv
        self._down, self._down_name = _convolution(down), down.state_name
        tables = mimi.quantizer.tables()
        self._project = pack(tables.project_in)
        self._entries, self._norms = as_array(tables.entries), as_array(tables.norms)
        self._packed = np.stack([pack(entries) for entries in tables.entries])

    @torch.inference_mode()
    def __call__(
        self, pcm: Floats, state: SlotState, slots: Slots, run: int = 1, outputs: bool = True
    ) -> npt.NDArray[np.int64]:
        """pcm [n, 1920] of n slots → codes [n, 8]; as models.mimi.Mimi.encode_frame, for these slots of `state`.

        run: frames of each slot, which is then named so often in a row. Bits are those of a call for each: all kernels
        take rows in order, or each by itself. outputs False: only the streams advance, and all codes are 0.
        """
        first, *histories, last = (as_array(state[name]) for name in self._names)
        frames = state["frames"].numpy()
        down = self._stages[-1][1]
        rows = POSITIONS_PER_FRAME * len(slots)
        out = np.zeros((rows, down.weight.shape[1] * 2), dtype=np.float32)
        encoder_front(pcm, slots, self._first, first, self._stages, tuple(histories), self._samples, out)
        x = _multiplied(down, out, len(slots))
        x = self._convolve(self._last, x, state[self._names[-1]], slots, activate=True)
        del last
        now = numbers(frames, slots, run)
        self._transform(x, state, slots, now)
        history = state[self._down_name].numpy()
        fresh = slots[now == 0]
        history[fresh] = x[now == 0, None, : self._config.d_model]  # a stream begins as if it had always been so
        latent = self._convolve(self._down, x, state[self._down_name], slots, activate=False)
        frames[slots] += run  # those named again are set to the same
        if not outputs:
            return np.zeros((len(slots), len(self._entries)), dtype=np.int64)
        projected = np.empty((len(slots), 2 * self._entries.shape[2]), dtype=np.float32)
        matmul(latent, self._project, projected)
        codes = np.empty((len(slots), len(self._entries)), dtype=np.int64)
        quantize(projected, self._entries, self._packed, self._norms, codes)
        return codes


class CompiledDecoder(_Half):
    """Codes → PCM."""

    def __init__(self, mimi: Mimi) -> None:
        super().__init__(mimi.decoder_transformer)
        first, *stages, last = _parts(mimi.decoder)
        self._first, self._last = _convolution(first), _convolution(last)
        self._stages = tuple(
            (_convolution(up), _residual(block)) for up, block in zip(stages[::2], stages[1::2], strict=True)
        )
        self._names = [first.state_name, *(name for stage in stages for name in _state_names(stage)), last.state_name]
        self._samples = FRAME_SAMPLES * mimi.config.seanet.n_filters
        tables = mimi.quantizer.tables()
        self._entries, self._project = as_array(tables.entries), pack(tables.project_out)
        self._up, self._up_name = as_array(mimi.upsample.packed().weight), mimi.upsample.state_name

    @torch.inference_mode()
    def __call__(
        self, codes: npt.NDArray[np.int64], state: SlotState, slots: Slots, run: int = 1, outputs: bool = True
    ) -> Floats:
        """codes [n, 8] of n slots → pcm [n, 1920]; as models.mimi.Mimi.decode_frame, for these slots of `state`.

        run: as in CompiledEncoder. outputs False: PCM of zeros, and the histories of the convolutions behind the
        transformer stay as they were; they reach some frames back, which are then to be run with outputs.
        """
        frames, dim = state["frames"].numpy(), self._config.d_model
        both = np.empty((len(slots), 2 * self._entries.shape[2]), dtype=np.float32)
        entries_of(codes, self._entries, both)
        latent = np.empty((len(slots), dim), dtype=np.float32)
        matmul(both, self._project, latent)
        x = np.empty((POSITIONS_PER_FRAME * len(slots), dim), dtype=np.float32)
        upsample(latent, self._up, as_array(state[self._up_name]), slots, x)
        x = x.reshape(len(slots), -1)
        self._transform(x, state, slots, numbers(frames, slots, run))
        frames[slots] += run  # those named again are set to the same
        if not outputs:
            return np.zeros((len(slots), FRAME_SAMPLES), dtype=np.float32)
        x = self._convolve(self._first, x, state[self._names[0]], slots, activate=False)
        x = self._convolve(self._stages[0][0], x, state[self._names[1]], slots, activate=True)
        _, *histories, last = (as_array(state[name]) for name in self._names)
        pcm = np.empty((len(slots), FRAME_SAMPLES), dtype=np.float32)
        decoder_back(
            x.reshape(-1), x.shape[1], slots, self._stages, tuple(histories), self._last, last, self._samples, pcm
        )
        return pcm


def _parts(seanet: Seanet) -> list[Any]:
    """Its convolutions and residual blocks in order, without what has no weights."""
    return [module for module in seanet.model if isinstance(module, (StreamingConv, ResidualBlock))]


def _state_names(module: Any) -> Sequence[str]:
    if isinstance(module, ResidualBlock):
        return [cast(StreamingConv, module.block[1]).state_name]
    return [cast(StreamingConv, module).state_name]


def _residual(block: ResidualBlock) -> Residual:
    return Residual(*(_convolution(cast(StreamingConv, block.block[index])) for index in (1, 3)))


def _convolution(module: StreamingConv) -> Convolution:
    weight, bias, hop = module.packed()
    return Convolution(pack(weight.t()), as_array(bias), weight.shape[0], hop)


def _stack(tensors: Any) -> Any:
    return as_array(torch.stack(list(tensors)))

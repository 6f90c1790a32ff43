"""Mimi, the codec: 24 kHz speech ↔ 8 codes every 80 ms, streamed for many slots at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.config import FRAME_SAMPLES, MimiConfig
from models.mimi_conv import Downsample, PackedModule, Upsample, advance, streaming_convs
from models.mimi_quantizer import SplitQuantizer
from models.mimi_seanet import build_decoder, build_encoder
from models.mimi_transformer import POSITIONS_PER_FRAME, MimiTransformer
from models.slot_state import SlotState

_FRAMES = "frames"  # frames a slot has done, int64
# Frames a whole sequence is worked through at a time: wide enough to be efficient, narrow enough for memory.
_SEQUENCE_CHUNK = 32


class Mimi(nn.Module):
    """Parameter and buffer names and shapes are the published ones.

    A frame is 1,920 samples; the whole codec shares 80 ms with the language model, so both directions aim at
    a few milliseconds. Streamed calls read tensors derived from the weights: in eval mode they are built by the
    first call (so call once before a CUDA graph is captured) and kept until weights are loaded or moved, or the
    mode changes; whoever writes weights in place in eval mode calls `unpack`.
    """

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        dim, samples = config.seanet.dimension, FRAME_SAMPLES
        for ratio in config.seanet.ratios:
            samples //= ratio
        if samples != POSITIONS_PER_FRAME or dim != config.transformer.d_model:
            raise ValueError(f"a codec frame has {POSITIONS_PER_FRAME} vectors of the transformer's width: {config}")
        self.config = config
        self.encoder = build_encoder(config.seanet)
        self.decoder = build_decoder(config.seanet)
        self.encoder_transformer = MimiTransformer(config.transformer)
        self.decoder_transformer = MimiTransformer(config.transformer)
        self.downsample = Downsample(dim, POSITIONS_PER_FRAME)
        self.upsample = Upsample(dim, POSITIONS_PER_FRAME)
        self.quantizer = SplitQuantizer(dim, config.quantizer, config.num_codebooks)
        for name, conv in streaming_convs(self):
            conv.state_name = name
        self.encoder_transformer.state_name = "encoder_transformer"
        self.decoder_transformer.state_name = "decoder_transformer"

    # The streamed codec: one frame of every slot a call.

    def init_encoder_state(
        self, slots: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> SlotState:
        """Fresh streams for `slots` conversations."""
        return self._init_state(("encoder.", "downsample."), self.encoder_transformer, slots, device, dtype)

    def init_decoder_state(
        self, slots: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> SlotState:
        """Fresh streams for `slots` conversations."""
        return self._init_state(("decoder.", "upsample"), self.decoder_transformer, slots, device, dtype)

    @torch.no_grad()
    def encode_frame(self, pcm: Tensor, state: SlotState, active: Tensor | None = None) -> Tensor:
        """pcm [slots, 1920] fp32 in -1 … 1 → codes [slots, 8] int64.

        `active` [slots] bool, None for all: the other rows are computed too, and their streams stay as they were.
        """
        return self._encode(pcm, state, active)

    @torch.no_grad()
    def decode_frame(self, codes: Tensor, state: SlotState, active: Tensor | None = None) -> Tensor:
        """codes [slots, 8] int64 → pcm [slots, 1920] fp32. `active` as in `encode_frame`."""
        return self._decode(codes.unsqueeze(1), state, active)

    def _encode(self, pcm: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, frames * 1920] → [slots * frames, 8]; more than one frame only where all rows are active."""
        frames = state[_FRAMES]
        x = self.encoder.step(pcm.unsqueeze(-1), state, active)
        x = self.encoder_transformer.step(x, state, frames)
        x = self.downsample.step(x, state, frames == 0, active)
        advance(state, _FRAMES, frames + x.shape[1], active)
        return self.quantizer.encode(x.flatten(0, 1))

    def _decode(self, codes: Tensor, state: SlotState, active: Tensor | None) -> Tensor:
        """[slots, frames, 8] → [slots, frames * 1920]; more than one frame only where all rows are active."""
        frames = state[_FRAMES]
        x = self.quantizer.decode(codes.flatten(0, 1)).view(*codes.shape[:2], -1)
        x = self.upsample.step(x, state, active)
        x = self.decoder_transformer.step(x, state, frames)
        advance(state, _FRAMES, frames + codes.shape[1], active)
        return self.decoder.step(x, state, active).squeeze(-1)

    # Whole sequences, equal to the streamed codec but for rounding.

    @torch.no_grad()
    def encode_sequence(self, pcm: Tensor, state: SlotState | None = None) -> Tensor:
        """pcm [batch, frames * 1920] fp32 → codes [batch, frames, 8] int64.

        `state`, of `batch` slots, is continued and left after the last frame (this is how a slot is rebuilt
        from its audio); by default the streams are fresh. Raises ValueError on a broken frame.
        """
        if pcm.shape[1] % FRAME_SAMPLES:
            raise ValueError(f"{pcm.shape[1]} samples are not whole frames of {FRAME_SAMPLES}")
        state = state or self.init_encoder_state(pcm.shape[0], device=pcm.device)
        parts = torch.split(pcm, _SEQUENCE_CHUNK * FRAME_SAMPLES, dim=1)
        codes = [self._encode(part, state, None).view(pcm.shape[0], -1, self.config.num_codebooks) for part in parts]
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def decode_sequence(self, codes: Tensor, state: SlotState | None = None) -> Tensor:
        """codes [batch, frames, 8] int64 → pcm [batch, frames * 1920] fp32. `state` as in `encode_sequence`."""
        state = state or self.init_decoder_state(codes.shape[0], device=codes.device)
        return torch.cat(
            [self._decode(part, state, None) for part in torch.split(codes, _SEQUENCE_CHUNK, dim=1)], dim=1
        )

    # Training: whole sequences from silence, differentiable, in the field's [batch, channels, time].

    def encode_latent(self, pcm: Tensor) -> Tensor:
        """pcm [batch, 1, frames * 1920] → latent [batch, dim, frames], before the quantizer."""
        x: Tensor = self.encoder(pcm)
        x = self.encoder_transformer(x.transpose(1, 2)).transpose(1, 2)
        latent: Tensor = self.downsample(x)
        return latent

    def decode_latent(self, latent: Tensor) -> Tensor:
        """latent [batch, dim, frames], after the quantizer → pcm [batch, 1, frames * 1920]."""
        x: Tensor = self.upsample(latent)
        x = self.decoder_transformer(x.transpose(1, 2)).transpose(1, 2)
        pcm: Tensor = self.decoder(x)
        return pcm

    def unpack(self) -> None:
        """Forgets what was derived from the weights; to be called after changing them in place."""
        for module in self.modules():
            if isinstance(module, PackedModule):
                module.drop_derived()

    def train(self, mode: bool = True) -> Mimi:
        if mode != self.training:
            self.unpack()
        super().train(mode)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        incompatible = super().load_state_dict(state_dict, strict, assign)
        self.unpack()
        return incompatible

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mimi:
        self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def _init_state(
        self,
        prefixes: tuple[str, ...],
        transformer: MimiTransformer,
        slots: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> SlotState:
        device = device if device is not None else next(self.parameters()).device
        shapes = {name: conv.state_shape() for name, conv in streaming_convs(self) if name.startswith(prefixes)}
        shapes |= transformer.state_shapes()
        tensors = {name: torch.zeros(slots, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        tensors[_FRAMES] = torch.zeros(slots, dtype=torch.int64, device=device)
        return SlotState(tensors)

"""Rings for the step of fixed shape: bf16 or fp32 as computed, or fp8 with a scale of its own for every key and value.

The scale belongs to one vector of head_dim numbers and to nothing else. A scale shared by a slot would have to be known
before its keys are, or change under those already stored; either way a cache rebuilt in chunks would differ from the
one that was filled frame by frame. It is a power of two, so that scaling is exact and bf16 holds it; it costs 1.6 % of
the fp8 ring at heads of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.attention import RowCache, SpanAttention
from graphs.kv_cache import KVPart, Span
from models.config import LMConfig

FP8 = torch.float8_e4m3fn
# amax / scale then lies in [128, 256): below e4m3's largest number, 448, and as far above its smallest as can be.
FP8_EXPONENT = 7
_BIAS, _MANTISSA = 127, 23  # of fp32
SCALE_AXIS = 2  # of a ring's scales [layers, heads, positions]


@dataclass(frozen=True)
class ScaledPart(KVPart):
    """An fp8 ring's positions, with their scales [2, layers, heads, frames]."""

    scales: Tensor

    @property
    def bytes(self) -> int:
        return super().bytes + self.scales.numel() * self.scales.element_size()


class RingCache(RowCache):
    """RowCache's layout, [layers, slots, heads, capacity, head_dim], read by graphs.cuda_step.StaticStep.

    scales: [2, layers, slots, heads, capacity] bf16 of keys and values, or None where they are stored as computed; with
    a pool [2, layers, pages, heads, KEY_BLOCK].
    page_table: the pool's table where the kernels read it, [slots, blocks] int32 on the device, at an address that a
    captured graph may keep; None without a pool.
    """

    def __init__(
        self,
        config: LMConfig,
        slots: int,
        tile: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        stored: torch.dtype | None = None,
        pages: int | None = None,
    ) -> None:
        """dtype: the model's; stored: FP8, or None for the model's own. pages: see KVCache. Raises ValueError for other
        dtypes."""
        if stored not in (None, dtype, FP8):
            raise ValueError(f"keys and values are stored in {dtype} or {FP8}, not in {stored}")
        super().__init__(config, slots, tile, device=device, dtype=stored or dtype, pages=pages)
        self.page_table = None
        if self.pool is not None:
            self.page_table = torch.from_numpy(self.pool.table).to(device, copy=True)
        self.tile = tile
        self.scales = None
        if stored == FP8:
            self.scales = torch.ones((2, *self.keys.shape[:-1]), device=device, dtype=torch.bfloat16)

    @property
    def layout(self) -> str:
        return f"RingCache-{str(self.keys.dtype).removeprefix('torch.')}"

    @property
    def bytes_per_slot(self) -> int:
        stretches, positions = self.places
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return super().bytes_per_slot + scales // (stretches * positions) * self.capacity

    def cover(self, spans: Sequence[Span]) -> None:
        """See KVCache.cover; the device's table follows, in the order of its stream."""
        super().cover(spans)
        if self.pool is not None and self.pool.changed:
            assert self.page_table is not None
            self.page_table.copy_(torch.from_numpy(self.pool.table))
            self.pool.changed = False

    def attention(self, spans: Sequence[Span]) -> SpanAttention:
        """For the portable backend. Raises ValueError for an fp8 ring, which only the static step reads."""
        if self.scales is not None:
            raise ValueError("torch's operators do not read fp8 rings: use the backend 'static-fp8' throughout")
        return super().attention(spans)

    @torch.inference_mode()
    def read(self, slot: int, frames: int) -> KVPart:
        """See KVCache.read."""
        part = super().read(slot, frames)
        if self.scales is None:
            return part
        halves = [self._ring(half, slot, frames, SCALE_AXIS) for half in self.scales]
        return ScaledPart(frames, part.keys, part.values, torch.stack(halves))

    @torch.inference_mode()
    def write(self, slot: int, part: KVPart) -> None:
        """See KVCache.write. Raises ValueError for a part of another dtype, too."""
        if part.keys.dtype != self.keys.dtype:
            raise ValueError(f"these keys are {part.keys.dtype}, the cache holds {self.keys.dtype}")
        super().write(slot, part)
        if self.scales is not None:
            assert isinstance(part, ScaledPart)
            for half, content in zip(self.scales, part.scales, strict=True):
                self._put(half, slot, content, SCALE_AXIS)

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """See KVCache.snapshot; with fp8 also scales [2, layers, heads, capacity]."""
        part = self.read(slot, self.capacity)
        taken = {"keys": part.keys.cpu(), "values": part.values.cpu()}
        return {**taken, "scales": part.scales.cpu()} if isinstance(part, ScaledPart) else taken

    def _part(self, snapshot: dict[str, Tensor]) -> KVPart:
        """Raises ValueError for a snapshot of another dtype."""
        if snapshot["keys"].dtype != self.keys.dtype:
            raise ValueError(f"this snapshot holds {snapshot['keys'].dtype}, the cache {self.keys.dtype}")
        if self.scales is None:
            return super()._part(snapshot)
        return ScaledPart(self.capacity, snapshot["keys"], snapshot["values"], snapshot["scales"])


def fp8_scale(vectors: Tensor) -> Tensor:
    """The scale of each vector [..., head_dim] → [...] fp32, a power of two; 2^-126 at the least."""
    largest = vectors.float().abs().amax(dim=-1)
    exponent = (largest.view(torch.int32) >> _MANTISSA) - FP8_EXPONENT
    return (exponent.clamp(min=1) << _MANTISSA).view(torch.float32)

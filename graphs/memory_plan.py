"""How many conversations a device's memory holds. Pure: bytes in, a number out.

Every part is counted, not guessed, but for what the processes themselves take (RESERVE_BYTES).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphs.anchors import AnchorPolicy
from graphs.backends import Backends
from graphs.kv_cache import KEY_BLOCK, round_up
from graphs.rings import spare_rings
from graphs.slot_engine import DEFAULT_TILE
from models.config import LMConfig, MimiConfig
from models.lm import LanguageModel

GIB = 1 << 30
# Three CUDA contexts, Mimi's weights twice, prompts' snapshots, a step's buffers and graphs. A guess, not measured yet.
RESERVE_BYTES = 4 * GIB
MOST_SLOTS = 256


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of a replica on one device."""

    weights: int
    context: int  # keys and values of one full context
    codec: int  # of one conversation's streams
    reserve: int = RESERVE_BYTES

    def needed(self, slots: int, anchors: AnchorPolicy | None, overcommit: float = 1.0) -> int:
        """What so many slots take."""
        contexts = max(1.0, (slots + spare_rings(slots, anchors)) / overcommit)
        return self.weights + self.reserve + int(contexts * self.context) + slots * self.codec

    def slots(self, memory_bytes: int, anchors: AnchorPolicy | None, overcommit: float = 1.0) -> int:
        """The most slots that fit, MOST_SLOTS at most. Raises ValueError, saying what is missing, if not one does."""
        if self.needed(1, anchors, overcommit) > memory_bytes:
            raise ValueError(
                f"one conversation needs {self.needed(1, anchors, overcommit) / GIB:.1f} GiB, the device has "
                f"{memory_bytes / GIB:.1f}: take a larger device, or kv_dtype fp8"
            )
        fitting, too_many = 1, MOST_SLOTS + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self.needed(middle, anchors, overcommit) <= memory_bytes:
                fitting = middle
            else:
                too_many = middle
        return fitting


def memory_plan(
    lm: LMConfig, mimi: MimiConfig, dtype: torch.dtype, backends: Backends, tile: int = DEFAULT_TILE
) -> MemoryPlan:
    """Of a model in `dtype`, and keys and values as `backends` says."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in LanguageModel(lm).parameters())
    positions = round_up(lm.window + tile, KEY_BLOCK)
    numbers = 2 * lm.num_layers * lm.num_heads * positions
    fp8 = backends.kv_dtype == "fp8" or backends.step == "static-fp8"
    # fp8 carries a bf16 scale for every vector.
    context = numbers * (lm.head_dim + 2) if fp8 else numbers * lm.head_dim * _kv_bytes(backends, dtype)
    transformer = mimi.transformer
    streams = 2 * transformer.num_layers * transformer.context * 2 * transformer.d_model * 4  # encoder, decoder; fp32
    return MemoryPlan(weights * dtype.itemsize, context, streams)


def _kv_bytes(backends: Backends, dtype: torch.dtype) -> int:
    return 2 if backends.kv_dtype == "bfloat16" else dtype.itemsize

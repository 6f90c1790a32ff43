"""Keys and values of every slot's temporal transformer: one ring a slot, shared by nobody."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import LMConfig
from models.lm import RowAttention

KEY_BLOCK = 128  # rings are whole blocks of keys: few shapes, and sums of one order


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one slot in a step: row start + i is position first + i."""

    start: int
    count: int
    slot: int
    first: int

    @property
    def last(self) -> int:
        return self.first + self.count - 1


@dataclass(frozen=True)
class KVPart:
    """Keys and values of a ring's positions 0 … frames - 1, laid out as in the cache they come from."""

    frames: int
    keys: Tensor
    values: Tensor

    @property
    def bytes(self) -> int:
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()


class KVCache(ABC):
    """A ring of `capacity` keys and values a layer, slot and head; how they lie in memory is the backend's choice.

    The key of position p stands at p % capacity. The capacity exceeds the attention window by a whole prefill
    tile: a chunk writes all its keys before its first row attends, and may not overwrite what that row still sees.

    keys, values: [layers, slots, heads, …], what follows being a head's ring.
    """

    keys: Tensor
    values: Tensor
    position_axis = 2  # of keys[:, slot] and values[:, slot], if these are [layers, heads, capacity, head_dim]

    def __init__(self, config: LMConfig, slots: int, tile: int) -> None:
        self.window = config.window
        self.capacity = round_up(config.window + tile, KEY_BLOCK)
        self.slots = slots

    @abstractmethod
    def attention(self, spans: Sequence[Span]) -> RowAttention:
        """The attention of one step. Spans lie end to end from row 0 on; rows behind them are padding."""

    @property
    def layout(self) -> str:
        """What engines must share for their caches to hold the same bits, besides model, dtype and tile."""
        return type(self).__name__

    @property
    def bytes_per_slot(self) -> int:
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def bytes_of(self, frames: int) -> int:
        """What `read` of so many frames takes."""
        return self.bytes_per_slot // self.capacity * frames

    @torch.inference_mode()
    def read(self, slot: int, frames: int) -> KVPart:
        """A copy of a slot's first positions on the cache's device. Raises ValueError beyond the ring's capacity."""
        if not 0 < frames <= self.capacity:
            raise ValueError(f"a ring of {self.capacity} positions has no first {frames}")
        keys, values = (ring[:, slot].narrow(self.position_axis, 0, frames) for ring in (self.keys, self.values))
        return KVPart(
            frames,
            keys.clone(memory_format=torch.contiguous_format),
            values.clone(memory_format=torch.contiguous_format),
        )

    @torch.inference_mode()
    def write(self, slot: int, part: KVPart) -> None:
        """Puts what `read` gave into a slot's first positions. Raises RuntimeError if it is another model's."""
        for ring, content in ((self.keys, part.keys), (self.values, part.values)):
            ring[:, slot].narrow(self.position_axis, 0, part.frames).copy_(content)

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot on the CPU: keys and values [layers, heads, …]."""
        return {
            "keys": self.keys[:, slot].to("cpu", copy=True),
            "values": self.values[:, slot].to("cpu", copy=True),
        }

    def restore(self, slot: int, snapshot: dict[str, Tensor]) -> None:
        """Puts a snapshot of the same model and backend into a slot; raises ValueError if its shape differs."""
        for name, ring in (("keys", self.keys), ("values", self.values)):
            if snapshot[name].shape != ring[:, slot].shape:
                raise ValueError(
                    f"this snapshot's {name} are {list(snapshot[name].shape)}, the slot's {list(ring[:, slot].shape)}"
                )
            ring[:, slot].copy_(snapshot[name])

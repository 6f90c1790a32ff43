"""Keys and values of every slot's temporal transformer: one ring a slot, shared by nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import LMConfig

KEY_BLOCK = 128  # rings, and the keys attended to, are whole blocks: few shapes, and sums of one order


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class KVCache:
    """Rings of [heads, capacity, head_dim] keys and values a layer and slot.

    The key of position p stands at p % capacity. The capacity exceeds the attention window by a whole prefill
    tile: a chunk writes all its keys before its first row attends, and may not overwrite what that row still sees.
    """

    def __init__(
        self, config: LMConfig, slots: int, tile: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.window = config.window
        self.capacity = round_up(config.window + tile, KEY_BLOCK)
        self.slots = slots
        shape = (config.num_layers, slots, config.num_heads, self.capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def bytes_per_slot(self) -> int:
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def write(self, layer: int, slots: Tensor, ring: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k, v [rows, heads, head_dim] at (slots [rows], ring [rows]), both int64."""
        self.keys[layer][slots, :, ring] = k.to(self.keys.dtype)
        self.values[layer][slots, :, ring] = v.to(self.values.dtype)

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot on the CPU: keys and values [layers, heads, capacity, head_dim]."""
        return {
            "keys": self.keys[:, slot].to("cpu", copy=True),
            "values": self.values[:, slot].to("cpu", copy=True),
        }

    def restore(self, slot: int, snapshot: dict[str, Tensor]) -> None:
        """Puts a snapshot of the same model into a slot; raises ValueError if its shape differs."""
        for name, ring in (("keys", self.keys), ("values", self.values)):
            if snapshot[name].shape != ring[:, slot].shape:
                raise ValueError(
                    f"this snapshot's {name} are {list(snapshot[name].shape)}, the slot's {list(ring[:, slot].shape)}"
                )
            ring[:, slot].copy_(snapshot[name])

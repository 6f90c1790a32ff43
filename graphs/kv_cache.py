"""Keys and values of every slot's temporal transformer: one ring a slot, shared by nobody.

A ring is one stretch of memory; or, where more is promised than there is, pages of KEY_BLOCK positions out of a pool
(graphs.paging). Both hold the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.paging import PagePool
from graphs.spans import KEY_BLOCK, Span, round_up
from models.config import LMConfig
from models.lm import RowAttention

__all__ = ["KEY_BLOCK", "KVCache", "KVPart", "Span", "round_up"]


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

    keys, values: [layers, slots, heads, …], what follows being a head's ring; with a pool [layers, pages, heads, …] and
    a head's KEY_BLOCK positions of a ring.
    """

    keys: Tensor
    values: Tensor
    position_axis = 2  # of keys[:, slot] and values[:, slot], if these are [layers, heads, capacity, head_dim]
    pool: PagePool | None = None

    def __init__(self, config: LMConfig, slots: int, tile: int, pages: int | None = None) -> None:
        """pages: how many there are for all slots together; None reserves every slot's whole ring."""
        self.window = config.window
        self.capacity = round_up(config.window + tile, KEY_BLOCK)
        self.slots = slots
        if pages is not None:
            self.pool = PagePool(pages, slots, self.blocks)

    @property
    def blocks(self) -> int:
        """KEY_BLOCKs of a ring."""
        return self.capacity // KEY_BLOCK

    @property
    def places(self) -> tuple[int, int]:
        """How many stretches of memory there are, and how many positions each holds."""
        return (self.slots, self.capacity) if self.pool is None else (self.pool.pages, KEY_BLOCK)

    @abstractmethod
    def attention(self, spans: Sequence[Span]) -> RowAttention:
        """The attention of one step. Spans lie end to end from row 0 on; rows behind them are padding.

        With a pool, `cover` must have been called with them."""

    @property
    def layout(self) -> str:
        """What engines must share for their caches to hold the same bits, besides model, dtype and tile. Pages change
        none."""
        return type(self).__name__

    @property
    def bytes_per_slot(self) -> int:
        """Of a full context."""
        stretches, positions = self.places
        return 2 * self.keys.numel() * self.keys.element_size() // (stretches * positions) * self.capacity

    def bytes_of(self, frames: int) -> int:
        """What `read` of so many frames takes."""
        return self.bytes_per_slot // self.capacity * frames

    def cover(self, spans: Sequence[Span]) -> None:
        """Gives the positions that a step is going to write their pages. Raises graphs.paging.OutOfPages."""
        if self.pool is not None:
            self.pool.cover(spans)

    def release(self, slot: int) -> None:
        """A ring's content is not wanted any more."""
        if self.pool is not None:
            self.pool.release(slot)

    @torch.inference_mode()
    def read(self, slot: int, frames: int) -> KVPart:
        """A copy of a slot's first positions on the cache's device. Raises ValueError beyond the ring's capacity."""
        if not 0 < frames <= self.capacity:
            raise ValueError(f"a ring of {self.capacity} positions has no first {frames}")
        axis = self.position_axis
        return KVPart(frames, self._ring(self.keys, slot, frames, axis), self._ring(self.values, slot, frames, axis))

    @torch.inference_mode()
    def write(self, slot: int, part: KVPart) -> None:
        """Puts what `read` gave into a slot's first positions. Raises RuntimeError if it is another model's,
        OutOfPages if the pool has none for it."""
        self.cover([Span(0, part.frames, slot, 0)])
        self._put(self.keys, slot, part.keys, self.position_axis)
        self._put(self.values, slot, part.values, self.position_axis)

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot on the CPU: keys and values [layers, heads, …]; what a pool has no page for is noise."""
        part = self.read(slot, self.capacity)
        return {"keys": part.keys.cpu(), "values": part.values.cpu()}

    def restore(self, slot: int, snapshot: dict[str, Tensor]) -> None:
        """Puts a snapshot of the same model and backend into a slot; raises ValueError if its shape differs, OutOfPages
        if the pool lacks the pages of a full context."""
        part = self._part(snapshot)
        own = [self.keys.shape[0], *self.keys.shape[2:]]
        own[self.position_axis] = self.capacity
        for name in ("keys", "values"):
            if list(snapshot[name].shape) != own:
                raise ValueError(f"this snapshot's {name} are {list(snapshot[name].shape)}, the slot's {own}")
        self.write(slot, part)

    def _part(self, snapshot: dict[str, Tensor]) -> KVPart:
        return KVPart(self.capacity, snapshot["keys"], snapshot["values"])

    def _ring(self, store: Tensor, slot: int, frames: int, axis: int) -> Tensor:
        """A copy [layers, heads, …] of a slot's first positions, which run along `axis` of it."""
        if self.pool is None:
            return store[:, slot].narrow(axis, 0, frames).clone(memory_format=torch.contiguous_format)
        pages = torch.from_numpy(self.pool.of(slot, -(-frames // KEY_BLOCK))).to(store.device)
        whole = _by_byte(store)[:, pages].movedim(1, axis).flatten(axis, axis + 1)
        return whole.narrow(axis, 0, frames).contiguous().view(store.dtype)

    def _put(self, store: Tensor, slot: int, content: Tensor, axis: int) -> None:
        frames = content.shape[axis]
        if self.pool is None:
            store[:, slot].narrow(axis, 0, frames).copy_(content)
            return
        for block, page in enumerate(self.pool.of(slot, -(-frames // KEY_BLOCK)).tolist()):
            here = min(KEY_BLOCK, frames - block * KEY_BLOCK)
            store[:, page].narrow(axis, 0, here).copy_(content.narrow(axis, block * KEY_BLOCK, here))


def _by_byte(store: Tensor) -> Tensor:
    """torch gathers no fp8 on a CPU."""
    return store.view(torch.uint8) if store.element_size() == 1 else store

"""State of many conversations in one set of tensors: dimension 0 of each is the slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SlotState:
    """Named tensors of shape [slots, ...]. A fresh slot is all zeros.

    Layers read and write it in place; whoever batches slots hands them a view (`group`), so that a layer
    never knows how many slots there are beside the ones it was given.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def group(self, start: int, stop: int) -> SlotState:
        """A view of slots start..stop-1; what is written to it is written here."""
        return SlotState({name: tensor[start:stop] for name, tensor in self.tensors.items()})

    def reset(self, slot: int) -> None:
        """Forgets everything slot `slot` holds."""
        for tensor in self.tensors.values():
            tensor[slot].zero_()

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot on the CPU: name → [...] of the tensor's own dtype."""
        return {name: tensor[slot].detach().to("cpu", copy=True) for name, tensor in self.tensors.items()}

    def restore(self, slot: int, snapshot: Mapping[str, Tensor]) -> None:
        """Puts a snapshot into a slot, whichever slot it was taken from.

        Raises ValueError if the snapshot belongs to a model of another shape.
        """
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in self.tensors.items()}
        given = {name: tuple(tensor.shape) for name, tensor in snapshot.items()}
        if shapes != given:
            raise ValueError(f"this snapshot was taken from another model: it holds {given}, the slot {shapes}")
        for name, tensor in self.tensors.items():
            tensor[slot].copy_(snapshot[name])

    def advance(self, name: str, value: Tensor, active: Tensor) -> None:
        """Replaces `name` by `value` [slots, ...] in the rows where `active` [slots] bool is set."""
        current = self.tensors[name]
        mask = active.view(-1, *([1] * (current.dim() - 1)))
        current.copy_(torch.where(mask, value, current))

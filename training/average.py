"""A running average of what is being trained: what is judged, fitted to and shipped (Polyak & Juditsky 1992).

At a rate that still learns, the newest weights are always a few hundred noisy steps from good; their average is
where the schedule's end would take them, at any time.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PREFIX = "average."
_MEMORY_STEPS = 500


class Average:
    """Of the parameters of a module that learn. Kept beside them, and in the same resume state."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._means = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        self._steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Counts the module's weights as they are now; to be called after every step."""
        self._steps += 1
        # At first a mean of all that was, so that the beginning does not last.
        share = max(1.0 / self._steps, 1.0 / _MEMORY_STEPS)
        for name, parameter in self._module.named_parameters():
            if name in self._means:
                self._means[name].lerp_(parameter.detach(), share)

    def state(self) -> dict[str, Tensor]:
        return {f"{_PREFIX}{name}": mean for name, mean in self._means.items()}

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Goes on from a saved state; parameters without an average there begin with what they are now."""
        self._steps = steps
        for name, parameter in self._module.named_parameters():
            if name in self._means:
                mean = tensors.get(f"{_PREFIX}{name}", parameter.detach())
                self._means[name].copy_(mean)

    def __enter__(self) -> None:
        """Within, the module has the average as its weights."""
        self._swap()

    def __exit__(self, *_error: object) -> None:
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._module.named_parameters():
            if name in self._means:
                newest = parameter.detach().clone()
                parameter.copy_(self._means[name])
                self._means[name].copy_(newest)


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a saved state, averages in place of what they are averages of."""
    means = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)} | means


def newest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a saved state as training left them."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}

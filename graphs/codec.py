"""Lanes: the codec as the stages run it, int16 in and out, one frame of any set of slots a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.config import FRAME_SAMPLES
from models.mimi import Mimi
from models.slot_state import SlotState

Int16 = npt.NDArray[np.int16]

# On a CPU a product's rounding depends on how many rows it has. Four consecutive slots are always computed
# together, whoever of them is there, so a slot's bits depend on nothing but its own stream.
CPU_GROUP = 4

_FULL_SCALE = 32_768.0

# inputs [group, width] fp32 or int64, state of the group, active [group] bool → outputs [group, width']
_Step = Callable[[Tensor, SlotState, Tensor], Tensor]


# Groups computed in one call where that gives the same bits; beyond four, nothing is gained.
_WIDTHS = (4, 2, 1)


def spans(groups: Sequence[int], widths: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts ascending group numbers into runs of neighbours [(first, width)], each as wide as `widths` allow.

    `widths` descends and ends with 1.
    """
    found: list[tuple[int, int]] = []
    at = 0
    while at < len(groups):
        first = groups[at]
        width = next(w for w in widths if list(groups[at : at + w]) == list(range(first, first + w)))
        found.append((first, width))
        at += width
    return found


class _Lane:
    """Slots of one direction of the codec, in groups that are computed together.

    `group` defaults to 4 on a CPU and to all slots on a CUDA device. An idle group costs nothing; an idle
    slot in a busy group costs as much as a busy one. `widths` are the numbers of neighbouring groups that one
    call may compute: more than one only where this machine has just shown that it changes no bit.
    """

    def __init__(
        self, step: _Step, state: Callable[[int], SlotState], slots: int, group: int, inputs: Callable[[int], Tensor]
    ) -> None:
        """`state(n)` makes n fresh slots, `inputs(n)` random inputs [n, width] for them, on the CPU."""
        self.slots, self.group = slots, group
        self._step, self._inputs_like = step, inputs
        groups = -(-slots // group)  # padded to whole groups; the padding is never active
        self._state = state(groups * group)
        self._device = self._state["frames"].device
        on_cuda = self._device.type == "cuda"
        # Staging, read by the device while nothing else writes: a lane is called by one thread.
        self._inputs = torch.zeros_like(inputs(groups * group), pin_memory=on_cuda)
        self._active = torch.zeros(groups * group, dtype=torch.bool, pin_memory=on_cuda)
        self.widths = tuple(
            width for width in _WIDTHS if width == 1 or (width <= groups and self._same_bits(state, width))
        )
        self._views = {
            (first, width): self._state.group(first * group, (first + width) * group)
            for width in self.widths
            for first in range(groups - width + 1)
        }

    @property
    def width_in(self) -> int:
        return self._inputs.shape[1]

    @torch.inference_mode()
    def _same_bits(self, state: Callable[[int], SlotState], width: int) -> bool:
        """Whether `width` groups in one call give the bits of `width` calls: a product may round otherwise
        with more rows. Two frames, compared in the outputs and in all that the streams keep."""
        rows = width * self.group
        joined, apart = state(rows), state(rows)
        active = torch.ones(rows, dtype=torch.bool, device=self._device)
        for _ in range(2):
            inputs = self._inputs_like(rows).to(self._device)
            expected = [
                self._step(inputs[at : at + self.group], apart.group(at, at + self.group), active[at : at + self.group])
                for at in range(0, rows, self.group)
            ]
            if not torch.equal(self._step(inputs, joined, active), torch.cat(expected)):
                return False
        return all(torch.equal(joined[name], apart[name]) for name in joined.tensors)

    def reset(self, slot: int) -> None:
        """Makes `slot` a fresh stream."""
        self._state.reset(self._checked(slot))

    def snapshot(self, slot: int) -> dict[str, Tensor]:
        """A copy of the stream of `slot`, on the CPU."""
        return self._state.snapshot(self._checked(slot))

    def restore(self, slot: int, snapshot: Mapping[str, Tensor]) -> None:
        """Goes on in `slot` where `snapshot` was taken; it may come from any slot of a lane of the same model.

        Raises ValueError if it is from another model.
        """
        self._state.restore(self._checked(slot), snapshot)

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} does not exist: this lane has {self.slots}")
        return slot

    def _check(self, slots: Sequence[int], data: Int16) -> None:
        if data.shape != (len(slots), self.width_in) or data.dtype != np.int16:
            raise ValueError(
                f"expected int16 [{len(slots)}, {self.width_in}] for {len(slots)} slots, "
                f"got {data.dtype} {list(data.shape)}"
            )
        if len(set(slots)) != len(slots):
            raise ValueError(f"a slot advances once a call, got {list(slots)}")
        for slot in slots:
            self._checked(slot)

    @torch.inference_mode()
    def _advance(
        self, slots: Sequence[int], rows: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.generic]:
        """Runs every group that has an active slot; returns the outputs of `slots`, in their order."""
        index = np.asarray(slots, dtype=np.int64)
        self._inputs.numpy()[index] = rows
        active = self._active.numpy()
        active[:] = False
        active[index] = True
        outputs: list[tuple[int, Tensor]] = []
        for first, width in spans(np.unique(index // self.group).tolist(), self.widths):
            start, stop = first * self.group, (first + width) * self.group
            inputs = self._inputs[start:stop].to(self._device, non_blocking=True)
            mask = self._active[start:stop].to(self._device, non_blocking=True)
            outputs.append((start, self._step(inputs, self._views[first, width], mask)))
        # Fetched only once all are under way, so that a device is waited for once.
        place = np.empty(len(self._active), dtype=np.int64)
        done = 0
        for start, output in outputs:
            place[start : start + len(output)] = np.arange(done, done + len(output))
            done += len(output)
        fetched: npt.NDArray[np.generic] = torch.cat([output for _, output in outputs]).cpu().numpy()[place[index]]
        return fetched


class EncoderLane(_Lane):
    """PCM → codes. The target for 16 slots both ways is 30 ms of the 80 on one core with the demo codec."""

    def __init__(
        self, mimi: Mimi, slots: int, group: int | None = None, device: torch.device | str | None = None
    ) -> None:
        device, group = _placed(mimi, slots, group, device)
        random = torch.Generator().manual_seed(0)

        def noise(rows: int) -> Tensor:
            return torch.rand(rows, FRAME_SAMPLES, generator=random) - 0.5

        self._codebooks = mimi.config.num_codebooks
        super().__init__(mimi.encode_frame, partial(mimi.init_encoder_state, device=device), slots, group, noise)

    def run(self, slots: Sequence[int], data: Int16) -> Int16:
        """PCM [n, 1920] int16 of n different slots → their codes [n, 8] int16; those slots advance one frame.

        Raises ValueError, and advances nothing, if a slot is unknown or named twice, or the shape is wrong.
        """
        self._check(slots, data)
        if not slots:
            return np.zeros((0, self._codebooks), dtype=np.int16)
        return self._advance(slots, data.astype(np.float32) / _FULL_SCALE).astype(np.int16)


class DecoderLane(_Lane):
    """Codes → PCM."""

    def __init__(
        self, mimi: Mimi, slots: int, group: int | None = None, device: torch.device | str | None = None
    ) -> None:
        device, group = _placed(mimi, slots, group, device)
        random = torch.Generator().manual_seed(0)
        self._bins = mimi.config.quantizer.bins

        def noise(rows: int) -> Tensor:
            return torch.randint(0, self._bins, (rows, mimi.config.num_codebooks), generator=random)

        super().__init__(mimi.decode_frame, partial(mimi.init_decoder_state, device=device), slots, group, noise)

    def run(self, slots: Sequence[int], data: Int16) -> Int16:
        """Codes [n, 8] int16 of n different slots → their PCM [n, 1920] int16; those slots advance one frame.

        Raises ValueError, and advances nothing, if a code is no entry of its codebook (on a GPU it would take
        the whole process down), a slot is unknown or named twice, or the shape is wrong.
        """
        self._check(slots, data)
        if not slots:
            return np.zeros((0, FRAME_SAMPLES), dtype=np.int16)
        if data.min() < 0 or data.max() >= self._bins:
            raise ValueError(f"codes must lie in 0 … {self._bins - 1}, got {data.min()} … {data.max()}")
        pcm = self._advance(slots, data.astype(np.int64)).astype(np.float32) * _FULL_SCALE
        clipped: Int16 = np.clip(np.rint(pcm), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
        return clipped


def _placed(mimi: Mimi, slots: int, group: int | None, device: torch.device | str | None) -> tuple[torch.device, int]:
    """Moves the codec to its device and settles the group's size."""
    if slots < 1 or (group is not None and group < 1):
        raise ValueError(f"a lane has at least one slot in groups of at least one, not {slots} in groups of {group}")
    if device is not None:
        mimi.to(device)
    mimi.eval()
    placed = next(mimi.parameters()).device
    return placed, group or (slots if placed.type == "cuda" else CPU_GROUP)

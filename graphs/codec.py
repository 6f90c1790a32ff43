"""Lanes: the codec as the stages run it, int16 in and out, one frame of any set of slots a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


class _Lane:
    """Slots of one direction of the codec, in groups that are computed together.

    `group` defaults to 4 on a CPU and to all slots on a CUDA device. An idle group costs nothing; an idle
    slot in a busy group costs as much as a busy one.
    """

    def __init__(
        self, step: _Step, state: SlotState, slots: int, group: int, width_in: int, dtype: torch.dtype
    ) -> None:
        self.slots, self.group = slots, group
        self._step, self._state = step, state
        self._width_in = width_in
        rows = state["frames"].shape[0]
        self._device = state["frames"].device
        on_cuda = self._device.type == "cuda"
        self._groups = [state.group(start, start + group) for start in range(0, rows, group)]
        # Staging, read by the device while nothing else writes: a lane is called by one thread.
        self._inputs = torch.zeros(rows, width_in, dtype=dtype, pin_memory=on_cuda)
        self._active = torch.zeros(rows, dtype=torch.bool, pin_memory=on_cuda)

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
        if data.shape != (len(slots), self._width_in) or data.dtype != np.int16:
            raise ValueError(
                f"expected int16 [{len(slots)}, {self._width_in}] for {len(slots)} slots, "
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
        outputs: dict[int, Tensor] = {}
        for number in sorted({slot // self.group for slot in slots}):
            rows_of = slice(number * self.group, (number + 1) * self.group)
            inputs = self._inputs[rows_of].to(self._device, non_blocking=True)
            mask = self._active[rows_of].to(self._device, non_blocking=True)
            outputs[number] = self._step(inputs, self._groups[number], mask)
        # Groups are only fetched once all are under way, so that a device is waited for once.
        fetched = {number: output.cpu().numpy() for number, output in outputs.items()}
        return np.stack([fetched[slot // self.group][slot % self.group] for slot in slots])


class EncoderLane(_Lane):
    """PCM → codes. The target for 16 slots both ways is 30 ms of the 80 on one core with the demo codec."""

    def __init__(
        self, mimi: Mimi, slots: int, group: int | None = None, device: torch.device | str | None = None
    ) -> None:
        device, group = _placed(mimi, slots, group, device)
        state = mimi.init_encoder_state(_rounded(slots, group), device=device)
        self._codebooks = mimi.config.num_codebooks
        super().__init__(mimi.encode_frame, state, slots, group, FRAME_SAMPLES, torch.float32)

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
        state = mimi.init_decoder_state(_rounded(slots, group), device=device)
        self._bins = mimi.config.quantizer.bins
        super().__init__(mimi.decode_frame, state, slots, group, mimi.config.num_codebooks, torch.int64)

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
    if slots < 1:
        raise ValueError(f"a lane has at least one slot, not {slots}")
    if device is not None:
        mimi.to(device)
    mimi.eval()
    placed = next(mimi.parameters()).device
    group = group or (slots if placed.type == "cuda" else CPU_GROUP)
    return placed, group


def _rounded(slots: int, group: int) -> int:
    """Slots padded to whole groups; the padding is never active."""
    return -(-slots // group) * group

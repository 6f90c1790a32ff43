"""The codec's two stages: Mimi encode and decode behind a frame gate. Plain, for one caller at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actors.gate import REPLAY_FRAMES, FrameGate
from graphs.stages import StageBatch, StageReply

Rows = npt.NDArray[np.int16]
FRAME_SAMPLES, CODEBOOKS = 1920, 8


class Lane(Protocol):
    """graphs.codec.EncoderLane or DecoderLane: the streaming state of all slots, advanced for the slots given."""

    def run(self, slots: Sequence[int], data: Rows) -> Rows: ...

    def reset(self, slot: int) -> None: ...


class LaneStage:
    """A graphs.stages.CodecStage. An exception of the lane itself is the stage's death: it may have advanced some
    slots of the batch and not others."""

    def __init__(self, lane: Lane, slots: int, in_width: int, out_width: int, replay_frames: int) -> None:
        self._lane = lane
        self._gate = FrameGate(slots, replay_frames)
        self._in_width, self._out_width = in_width, out_width

    def open(self, session: str, epoch: int, slot: int) -> None:
        """Starts a fresh stream in `slot`; the same open again leaves it as it is. Raises StaleEpoch, SlotTaken."""
        opened = self._gate.open(session, epoch, slot)
        if opened.displaced is not None:
            self._lane.reset(opened.displaced)
        if opened.fresh:
            self._lane.reset(slot)

    def step(self, batch: StageBatch) -> StageReply:
        """Advances every conversation whose next frame is in the batch. Raises ValueError for a malformed batch."""
        if batch.data.shape[1:] != (self._in_width,) or batch.data.dtype != np.int16:
            raise ValueError(
                f"a batch of {batch.data.shape} {batch.data.dtype} came, rows are [{self._in_width}] int16"
            )
        plan = self._gate.admit(batch, self._out_width)
        plan = self._gate.refuse(plan, self._faults(plan.data))
        rows = np.zeros((0, self._out_width), dtype=np.int16)
        return self._gate.commit(plan, self._lane.run(plan.slots, plan.data) if plan.slots else rows)

    def close(self, session: str, epoch: int) -> None:
        """Frees the slot and wipes its state; closing what is not open does nothing but fence a late open."""
        slot = self._gate.close(session, epoch)
        if slot is not None:
            self._lane.reset(slot)  # what a caller said is not kept a moment longer than the call

    def _faults(self, data: Rows) -> dict[int, str]:
        """Rows that must not reach the lane: index → reason."""
        return {}


class EncoderStage(LaneStage):
    """PCM [n, 1920] → user codes [n, 8]. Any int16 is PCM."""

    def __init__(self, lane: Lane, slots: int, replay_frames: int = REPLAY_FRAMES) -> None:
        super().__init__(lane, slots, FRAME_SAMPLES, CODEBOOKS, replay_frames)


class DecoderStage(LaneStage):
    """Agent codes [n, 8], each below `card`, → PCM [n, 1920]."""

    def __init__(self, lane: Lane, slots: int, card: int, replay_frames: int = REPLAY_FRAMES) -> None:
        super().__init__(lane, slots, CODEBOOKS, FRAME_SAMPLES, replay_frames)
        self._card = card

    def _faults(self, data: Rows) -> dict[int, str]:
        return code_faults(data, self._card)


def code_faults(data: Rows, card: int) -> dict[int, str]:
    """Rows with a code outside 0 … card - 1. An index out of an embedding's range would raise for the whole batch
    on a CPU, and kill the process's CUDA context on a GPU."""
    bad = np.flatnonzero(((data < 0) | (data >= card)).any(axis=1))
    return {int(i): f"codes {data[i].tolist()} are not all within 0 … {card - 1}" for i in bad}

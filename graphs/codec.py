"""Lanes: the codec as the stages run it, int16 in and out, one frame of any set of slots a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphs.codec_runners import CompiledRunner, CompiledStep, GroupedRunner, Runner, StaticRunner, Step
from graphs.sampling import HAS_NUMBA
from models.config import FRAME_SAMPLES
from models.mimi import Mimi
from models.slot_state import SlotState

Int16 = npt.NDArray[np.int16]

# compiled: numba's kernels on a CPU; static: one step of fixed shape, on CUDA a graph; torch: operators, in groups.
RUNNERS = ("auto", "compiled", "static", "torch")

# On a CPU a torch product's rounding depends on how many rows it has. Four consecutive slots are always computed
# together, whoever of them is there, so a slot's bits depend on nothing but its own stream.
CPU_GROUP = 4

_FULL_SCALE = 32_768.0


class _Lane:
    """Slots of one direction of the codec. For one caller at a time."""

    def __init__(self, runner: Runner, slots: int, width_in: int) -> None:
        self.slots, self.width_in = slots, width_in
        self.runner = runner
        self._state = runner.state

    @property
    def group(self) -> int:
        """Slots s of equal s // group cost as much as one of them."""
        return self.runner.group

    @property
    def run_most(self) -> int:
        """Frames of one slot that `replay` takes at once to its advantage."""
        return self.runner.run_most

    def replay(self, slots: Sequence[int], data: Int16, *, outputs: bool) -> None:
        """Advances n different slots by k frames each, [n, k, width] int16, with the bits that k calls of `run` would
        leave; nobody hears it. outputs False: what comes after the transformer is not computed, so that the last few
        frames before a stream is heard again (`models.config.MimiConfig.receptive_frames` says how many) must be
        replayed with them. Raises ValueError as `run` does.
        """
        if data.ndim != 3:
            raise ValueError(f"expected frames [slots, k, {self.width_in}], got {list(data.shape)}")
        self._check(slots, data[:, 0])
        self.runner.replay(np.asarray(slots, dtype=np.int64), self._inputs(data), outputs)

    def _inputs(self, data: Int16) -> npt.NDArray[Any]:
        """What a runner is given for frames [..., width] int16. Raises ValueError for what would bring it down."""
        raise NotImplementedError

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


class EncoderLane(_Lane):
    """PCM → codes. The target for 16 slots both ways is 30 ms of the 80 on one core with the demo codec."""

    def __init__(
        self,
        mimi: Mimi,
        slots: int,
        group: int | None = None,
        device: torch.device | str | None = None,
        runner: str = "auto",
    ) -> None:
        """runner: one of RUNNERS; group: slots that torch computes together. Raises ValueError for what cannot be."""
        random = torch.Generator().manual_seed(0)

        def noise(rows: int) -> Tensor:
            return torch.rand(rows, FRAME_SAMPLES, generator=random) - 0.5

        def compiled() -> CompiledStep:
            from graphs.compiled_codec import CompiledEncoder  # needs numba, which may not be there

            return CompiledEncoder(mimi)

        state = partial(mimi.init_encoder_state, device=device)
        chosen = _runner(mimi, slots, group, device, runner, mimi.encode_frame, compiled, state, noise)
        self._codebooks = mimi.config.num_codebooks
        super().__init__(chosen, slots, FRAME_SAMPLES)

    def run(self, slots: Sequence[int], data: Int16) -> Int16:
        """PCM [n, 1920] int16 of n different slots → their codes [n, 8] int16; those slots advance one frame.

        Raises ValueError, and advances nothing, if a slot is unknown or named twice, or the shape is wrong.
        """
        return self.start(slots, data)()

    def start(self, slots: Sequence[int], data: Int16) -> Callable[[], Int16]:
        """`run` in two: begins, on a GPU without waiting, and returns what waits for the codes."""
        self._check(slots, data)
        if not slots:
            return lambda: np.zeros((0, self._codebooks), dtype=np.int16)
        fetch = self.runner.start(np.asarray(slots, dtype=np.int64), self._inputs(data))
        return lambda: fetch().astype(np.int16)

    def _inputs(self, data: Int16) -> npt.NDArray[Any]:
        return data.astype(np.float32) / _FULL_SCALE


class DecoderLane(_Lane):
    """Codes → PCM."""

    def __init__(
        self,
        mimi: Mimi,
        slots: int,
        group: int | None = None,
        device: torch.device | str | None = None,
        runner: str = "auto",
    ) -> None:
        """See EncoderLane."""
        random = torch.Generator().manual_seed(0)
        self._bins = mimi.config.quantizer.bins

        def noise(rows: int) -> Tensor:
            return torch.randint(0, self._bins, (rows, mimi.config.num_codebooks), generator=random)

        def compiled() -> CompiledStep:
            from graphs.compiled_codec import CompiledDecoder  # needs numba, which may not be there

            return CompiledDecoder(mimi)

        state = partial(mimi.init_decoder_state, device=device)
        chosen = _runner(mimi, slots, group, device, runner, mimi.decode_frame, compiled, state, noise)
        super().__init__(chosen, slots, mimi.config.num_codebooks)

    def run(self, slots: Sequence[int], data: Int16) -> Int16:
        """Codes [n, 8] int16 of n different slots → their PCM [n, 1920] int16; those slots advance one frame.

        Raises ValueError, and advances nothing, if a code is no entry of its codebook (on a GPU it would take
        the whole process down), a slot is unknown or named twice, or the shape is wrong.
        """
        return self.start(slots, data)()

    def start(self, slots: Sequence[int], data: Int16) -> Callable[[], Int16]:
        """`run` in two: begins, on a GPU without waiting, and returns what waits for the samples."""
        self._check(slots, data)
        if not slots:
            return lambda: np.zeros((0, FRAME_SAMPLES), dtype=np.int16)
        fetch = self.runner.start(np.asarray(slots, dtype=np.int64), self._inputs(data))

        def pcm() -> Int16:
            samples = fetch().astype(np.float32) * _FULL_SCALE
            clipped: Int16 = np.clip(np.rint(samples), -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
            return clipped

        return pcm

    def _inputs(self, data: Int16) -> npt.NDArray[Any]:
        if data.min() < 0 or data.max() >= self._bins:
            raise ValueError(f"codes must lie in 0 … {self._bins - 1}, got {data.min()} … {data.max()}")
        return data.astype(np.int64)


def _runner(
    mimi: Mimi,
    slots: int,
    group: int | None,
    device: torch.device | str | None,
    name: str,
    step: Step,
    compiled: Callable[[], CompiledStep],
    state: Callable[[int], SlotState],
    noise: Callable[[int], Tensor],
) -> Runner:
    """Moves the codec to its device and settles how it runs there: as asked, or as is fastest."""
    if slots < 1 or (group is not None and group < 1):
        raise ValueError(f"a lane has at least one slot in groups of at least one, not {slots} in groups of {group}")
    if name not in RUNNERS:
        raise ValueError(f"there is no codec runner {name!r}, only {', '.join(RUNNERS)}")
    if device is not None:
        mimi.to(device)
    mimi.eval()
    placed = next(mimi.parameters()).device
    if name == "auto":
        name = "static" if placed.type == "cuda" else "compiled" if _compilable(mimi) else "torch"
        name = "torch" if group is not None else name
    if name == "compiled":
        if not _compilable(mimi):
            raise ValueError("the compiled codec needs numba, a CPU, and fp32 weights with heads of a multiple of 16")
        return CompiledRunner(compiled(), state(slots))
    if name == "static":
        return StaticRunner(step, state, slots, noise(slots))
    return GroupedRunner(step, state, slots, group or (slots if placed.type == "cuda" else CPU_GROUP), noise)


def _compilable(mimi: Mimi) -> bool:
    if not HAS_NUMBA:
        return False
    from graphs.compiled_codec import fits  # needs numba

    return fits(mimi)

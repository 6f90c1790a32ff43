"""How a lane's frames are computed: compiled on a CPU, as one CUDA graph on a GPU, in torch's operators anywhere.

All of them advance any set of a lane's slots by a frame and give a slot the bits of its own stream alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.slot_state import SlotState

Rows = npt.NDArray[Any]
Index = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

# inputs [group, width] fp32 or int64, state of the group, active [group] bool → outputs [group, width']
Step = Callable[[Tensor, SlotState, Tensor], Tensor]


# Groups computed in one call where that gives the same bits; beyond four, nothing is gained.
_WIDTHS = (4, 2, 1)


class CompiledStep(Protocol):
    """graphs.compiled_codec's two."""

    def __call__(self, rows: Rows, state: SlotState, slots: Index, run: int = 1, outputs: bool = True, /) -> Rows:
        """inputs [n, width], the state of all slots, the n slots, each `run` times in a row → outputs [n, width']"""
        ...


class Runner(Protocol):
    """Slots of one direction of the codec. For one thread."""

    state: SlotState
    group: int  # slots that cost as much as one of them: those of equal slot // group

    def start(self, slots: Index, rows: Rows) -> Callable[[], Rows]:
        """Begins a frame of n different slots with their inputs [n, width]; what comes back waits for the outputs.

        On a GPU it goes on beside whatever the host does next. One frame at a time: RuntimeError otherwise.
        """
        ...

    run_most: int  # frames of one slot that `replay` may be given at once, to its advantage

    def replay(self, slots: Index, rows: Rows, outputs: bool) -> None:
        """Advances n streams by k frames each, [n, k, width], with the bits that k calls of `start` would leave. What
        comes out is lost. outputs False: what only concerns outputs need not even be computed (`_Lane.replay`)."""
        ...


class CompiledRunner:
    """Exactly the slots given, in one call (graphs.compiled_codec). An idle slot costs nothing."""

    group = 1
    run_most = 16  # products of so many rows use the weights well; with longer runs frames would wait behind one call

    def __init__(self, step: CompiledStep, state: SlotState) -> None:
        self.state = state
        self._step = step

    def start(self, slots: Index, rows: Rows) -> Callable[[], Rows]:
        """See Runner; on return it is done."""
        done = self._step(rows, self.state, slots)
        return lambda: done

    def replay(self, slots: Index, rows: Rows, outputs: bool) -> None:
        """See Runner."""
        count, run, width = rows.shape
        self._step(rows.reshape(count * run, width), self.state, np.repeat(slots, run), run, outputs)


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


class _FrameByFrame:
    """For runners whose rows are tied to slots."""

    run_most = 1

    def start(self, slots: Index, rows: Rows) -> Callable[[], Rows]:
        raise NotImplementedError

    def replay(self, slots: Index, rows: Rows, outputs: bool) -> None:
        """See Runner."""
        del outputs  # what computes them computes the rest as well
        for frame in range(rows.shape[1]):
            self.start(slots, rows[:, frame])()


class GroupedRunner(_FrameByFrame):
    """Groups of slots whose rows are always computed together: a product's rounding may depend on its rows.

    An idle group costs nothing; an idle slot in a busy group costs as much as a busy one. `widths` are the numbers of
    neighbouring groups that one call may compute: more than one only where this machine has just shown that it changes
    no bit.
    """

    def __init__(
        self, step: Step, state: Callable[[int], SlotState], slots: int, group: int, inputs: Callable[[int], Tensor]
    ) -> None:
        """`state(n)` makes n fresh slots, `inputs(n)` random inputs [n, width] for them, on the CPU."""
        self.group = group
        self._step, self._inputs_like = step, inputs
        groups = -(-slots // group)  # padded to whole groups; the padding is never active
        self.state = state(groups * group)
        self._device = self.state["frames"].device
        on_cuda = self._device.type == "cuda"
        # Staging, read by the device while nothing else writes: a lane is called by one thread.
        self._inputs = torch.zeros_like(inputs(groups * group), pin_memory=on_cuda)
        self._active = torch.zeros(groups * group, dtype=torch.bool, pin_memory=on_cuda)
        self.widths = tuple(
            width for width in _WIDTHS if width == 1 or (width <= groups and self._same_bits(state, width))
        )
        self._views = {
            (first, width): self.state.group(first * group, (first + width) * group)
            for width in self.widths
            for first in range(groups - width + 1)
        }

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

    @torch.inference_mode()
    def start(self, slots: Index, rows: Rows) -> Callable[[], Rows]:
        """See Runner; runs every group that has an active slot."""
        self._inputs.numpy()[slots] = rows
        active = self._active.numpy()
        active[:] = False
        active[slots] = True
        outputs: list[tuple[int, Tensor]] = []
        for first, width in spans(np.unique(slots // self.group).tolist(), self.widths):
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
        fetched: Rows = torch.cat([output for _, output in outputs]).cpu().numpy()[place[slots]]
        return lambda: fetched


class StaticRunner(_FrameByFrame):
    """All slots in one step of fixed shape, who is active being part of its input; on CUDA one graph on its own stream.

    The copies in and out are in the graph, too: a frame is one launch, and the host waits where its outputs are asked
    for. So encoder, engine and decoder of one process can be under way at once. On a CPU the same step runs without a
    graph, for tests.
    """

    def __init__(self, step: Step, state: Callable[[int], SlotState], slots: int, inputs: Tensor) -> None:
        """inputs: what a frame of all slots could be given, [slots, width] on the CPU."""
        self.group = slots
        self.state = state(slots)
        self._step = step
        self._device = self.state["frames"].device
        on_cuda = self._device.type == "cuda"
        self._host_inputs = torch.empty_like(inputs, pin_memory=on_cuda).copy_(inputs)
        self._host_active = torch.zeros(slots, dtype=torch.bool, pin_memory=on_cuda)
        self._inputs = self._host_inputs.to(self._device)
        self._active = self._host_active.to(self._device)
        with torch.inference_mode():
            output = step(self._inputs, self.state, self._active)  # of nobody: no stream advances
        self._host_output = torch.empty(output.shape, dtype=output.dtype, pin_memory=on_cuda)
        self._waiting = False
        self._stream: Any = None  # on CUDA
        self._graph: Any = None
        if on_cuda:
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether a frame is one CUDA graph."""
        return self._graph is not None

    def _run(self) -> None:
        self._inputs.copy_(self._host_inputs, non_blocking=True)
        self._active.copy_(self._host_active, non_blocking=True)
        self._host_output.copy_(self._step(self._inputs, self.state, self._active), non_blocking=True)

    @torch.inference_mode()
    def _capture(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's own omission
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._run()
            self._run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Another thread of the process may allocate meanwhile; only this one's calls are recorded.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            log.warning("the codec runs without a CUDA graph, one launch after the other: %s", error)
            return
        self._graph = graph

    @torch.inference_mode()
    def start(self, slots: Index, rows: Rows) -> Callable[[], Rows]:
        """See Runner."""
        if self._waiting:
            raise RuntimeError("the frame before this one was begun and its outputs were not fetched yet")
        self._host_inputs.numpy()[slots] = rows
        active = self._host_active.numpy()
        active[:] = False
        active[slots] = True
        if self._stream is None:
            self._run()
        else:
            # Whoever reset or restored a slot did so on the current stream.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                if self._graph is not None:
                    self._graph.replay()
                else:
                    self._run()
                self._done.record(self._stream)
        self._waiting = True

        def fetch() -> Rows:
            if self._stream is not None:
                self._done.synchronize()
            self._waiting = False
            fetched: Rows = self._host_output.numpy()[slots]
            return fetched

        return fetch

"""The language model's stage: a conversation engine behind a frame gate. Plain, for one caller at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actors.codec_stage import CODEBOOKS, code_faults
from actors.errors import BadRequest, NoCapacity
from actors.gate import REPLAY_FRAMES, FrameGate, Plan
from graphs.kv_pressure import KVPressure
from graphs.paging import OutOfPages
from graphs.stages import ConverseReply, MemoryReport, Past, PromptInfo, SessionSpec, StageBatch

Rows = npt.NDArray[np.int16]
TOKENS_WIDTH, ROW_WIDTH, FIRST_ROW_WIDTH = 9, 17, 2  # a frame's number takes two of 16 bits
REPORT_EVERY = 6  # steps between two looks at the memory: half a second
KEPT_WIDTH = TOKENS_WIDTH + 2 * ROW_WIDTH + FIRST_ROW_WIDTH  # what the gate keeps of a step, to answer it again


class Prompt(Protocol):
    """What an engine says about a prompt it has taken."""

    @property
    def frames(self) -> int: ...

    @property
    def digest(self) -> str: ...


class Step(Protocol):
    """What an engine's step gave."""

    @property
    def tokens(self) -> Rows:
        """[n, 9] int16"""
        ...

    @property
    def journal(self) -> Rows:
        """[n, 17] int16"""
        ...

    @property
    def ready(self) -> tuple[int, ...]:
        """Slots whose prompt is in the cache since this step."""
        ...

    @property
    def next_columns(self) -> Rows:
        """[n, 17] int16"""
        ...

    @property
    def first_rows(self) -> npt.NDArray[np.int32]:
        """[n] int32"""
        ...

    @property
    def pending(self) -> int:
        """Slots whose prompt is not."""
        ...


class Engine(Protocol):
    """graphs.engine.ConversationEngine: numbers its slots and knows nothing of sessions."""

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> Prompt:
        """Raises ValueError, with a sentence for the user, for a spec it cannot serve or a past that cannot be."""
        ...

    def step(self, slots: Sequence[int], codes: Rows) -> Step: ...

    def close(self, slot: int) -> None: ...


class Overcommitted(Protocol):
    """graphs.engine.ConversationEngine, where it promises more KV cache than it has."""

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Those of `slots` that cannot go on now."""
        ...

    @property
    def parked(self) -> Sequence[int]:
        """Slots that wait for memory."""
        ...

    @property
    def pressure(self) -> KVPressure | None: ...


class EngineStage:
    """A graphs.stages.ConverseStage. An exception of the engine's step is the stage's death."""

    def __init__(
        self,
        engine: Engine,
        slots: int,
        card: int,
        replay_frames: int = REPLAY_FRAMES,
        memory: Overcommitted | None = None,
    ) -> None:
        """memory: the engine once more, if its slots share fewer contexts than there are slots."""
        self._engine = engine
        self._memory = memory
        self._steps, self._parked = 0, tuple[int, ...]()
        self._card = card
        self._gate = FrameGate(slots, replay_frames)
        self._prompts: dict[str, PromptInfo] = {}
        self._again: list[tuple[str, int]] = []  # whose Ready is to be said once more

    def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> PromptInfo:
        """Takes the prompt; `step` says when it is in. The same open again changes nothing, but has its Ready said
        once more: the first may have been lost with the reply it was in.

        past: of a conversation that another engine has held; its next frame is then `past.next_frame`.
        tenant: who may know how fast this prompt is.

        Raises BadRequest for a spec the engine cannot serve, NoCapacity where the others need its memory, and then
        holds nothing; StaleEpoch, SlotTaken.
        """
        opened = self._gate.open(session, epoch, slot, ready=False, first_frame=past.next_frame if past else 0)
        if not opened.fresh:
            if self._gate.is_ready(session, epoch):
                self._again.append((session, epoch))
            return self._prompts[session]
        try:
            if opened.displaced is not None:
                self._engine.close(opened.displaced)
            prompt = self._engine.open(slot, spec, past=past, tenant=tenant)
        except ValueError as error:
            self._forget(session, epoch)
            raise BadRequest(str(error)) from error
        except OutOfPages as full:
            self._forget(session, epoch)
            raise NoCapacity(f"This replica's memory is promised to others: {full}.") from full
        self._prompts[session] = PromptInfo(prompt.frames, prompt.digest)
        return self._prompts[session]

    def step(self, batch: StageBatch) -> ConverseReply:
        """Advances every conversation whose next frame is in the batch, and all prompts that are not in yet."""
        if batch.data.shape[1:] != (CODEBOOKS,) or batch.data.dtype != np.int16:
            raise ValueError(f"a batch of {batch.data.shape} {batch.data.dtype} came, rows are [{CODEBOOKS}] int16")
        plan = self._gate.admit(batch, KEPT_WIDTH)
        plan = self._gate.refuse(plan, code_faults(plan.data, self._card))
        plan = self._without_parked(plan)
        out = self._engine.step(plan.slots, plan.data)
        first_rows = out.first_rows.astype(np.int32).view(np.int16).reshape(-1, FIRST_ROW_WIDTH)
        kept = np.concatenate([out.tokens, out.journal, out.next_columns, first_rows], axis=1)
        reply = self._gate.commit(plan, kept)
        tokens, journal, begun, first = np.split(reply.data, np.cumsum((TOKENS_WIDTH, ROW_WIDTH, ROW_WIDTH)), axis=1)
        ready = self._again + [owner for slot in out.ready if (owner := self._gate.owner(slot)) is not None]
        for session, _ in ready:
            self._gate.set_ready(session)
        self._again = []
        return ConverseReply(
            frames=reply._replace(data=np.ascontiguousarray(tokens)),
            journal=np.ascontiguousarray(journal),
            next_columns=np.ascontiguousarray(begun),
            first_rows=np.ascontiguousarray(first).view(np.int32).reshape(-1),
            ready=tuple(ready),
            failed=(),  # the engine refuses a spec in open, before it begins
            pending=out.pending,
            memory=self._memory_report(),
        )

    def _without_parked(self, plan: Plan) -> Plan:
        """Leaves out of a step whoever has no memory for it now, and has them wait until they are ready again."""
        if self._memory is None:
            return plan
        waiting = self._memory.make_room(plan.slots)
        for slot in self._memory.parked:
            if (owner := self._gate.owner(slot)) is not None:
                self._gate.set_ready(owner[0], ready=False)
        return self._gate.postpone(plan, waiting)

    def _memory_report(self) -> MemoryReport | None:
        """Every half a second, since what is foreseen is seconds away, and at once when somebody is parked or is not
        any more."""
        if self._memory is None:
            return None
        self._steps, before = self._steps + 1, self._parked
        self._parked = tuple(self._memory.parked)
        if self._steps % REPORT_EVERY != 1 and self._parked == before:
            return None
        seen = self._memory.pressure
        if seen is None:
            return None
        return MemoryReport(
            room=seen.room,
            pressure=seen.pressure,
            migrate=self._owners(seen.migrate),
            parked=self._owners(seen.parked),
            seconds_left=seen.seconds_left,
            pages=seen.pages,
            free_pages=seen.free_pages,
        )

    def _owners(self, slots: Sequence[int]) -> tuple[tuple[str, int], ...]:
        return tuple(owner for slot in slots if (owner := self._gate.owner(slot)) is not None)

    def close(self, session: str, epoch: int) -> None:
        """Frees the slot; closing what is not open does nothing but fence a late open."""
        slot = self._forget(session, epoch)
        if slot is not None:
            self._engine.close(slot)

    def clear(self) -> None:
        """Closes whatever is open: its caller has lost the other stages' half of it."""
        for session, epoch in self._gate.owners():
            self.close(session, epoch)

    def _forget(self, session: str, epoch: int) -> int | None:
        slot = self._gate.close(session, epoch)
        if slot is not None:
            self._prompts.pop(session, None)
            self._again = [owner for owner in self._again if owner[0] != session]
        return slot

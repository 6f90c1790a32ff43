"""One GPU's (or CPU's) slots: the conversations that hold them, around the frame loop of actors.stage_loop.

A frame's way: `offer` → encoder → engine → decoder → the conversation's sink.

A conversation begins here with a prompt, or goes on from the journal of a replica that died or is being emptied; its
slot changes hands when its client resumes it; and it leaves when its ingress closes it, having moved it elsewhere.

Plain asyncio, no Ray: a stage is an actors.interfaces.CodecHandle or ConverseHandle, whatever is behind it. When one of
them fails, the state of every conversation is gone: each gets Failed("engine_lost"), and the replica takes none until
`revive`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from actors.calls import Calls
from actors.continuation import continues
from actors.errors import Draining, EngineLost, StaleEpoch, UnknownSession
from actors.interfaces import (
    Clock,
    CodecHandle,
    ConverseHandle,
    FrameMetrics,
    MonotonicClock,
    NoMetrics,
    Pieces,
    ReplicaSettings,
)
from actors.journal import Journal
from actors.messages import DownSink, FrameIn, OpenRequest, SlotReport
from actors.overload import Overload
from actors.stage_loop import StageLoops
from actors.stage_set import StageSet
from actors.tenure import Tenure

log = logging.getLogger(__name__)


class Replica:
    """Used from one event loop. `run` has to be running for frames and prompts to advance."""

    def __init__(
        self,
        encoder: CodecHandle,
        converse: ConverseHandle,
        decoder: CodecHandle,
        *,
        slots: int,
        tokenizer: Pieces,
        numerics_id: str = "",
        settings: ReplicaSettings | None = None,
        clock: Clock | None = None,
        metrics: FrameMetrics | None = None,
    ) -> None:
        self.numerics_id = numerics_id
        self._settings = settings or ReplicaSettings()
        self._clock: Clock = clock or MonotonicClock()
        self._halt = asyncio.Event()
        self._loops_gone = asyncio.Event()
        self._loops_gone.set()
        self._stages = StageSet(
            encoder, converse, decoder, self._clock, self._settings.stage_timeout_s, on_fault=self._lose_all
        )
        self._calls = Calls(slots, self._stages, self._clock, numerics_id)
        self._overload = Overload()
        self._loops = StageLoops(
            self._stages, self._calls, tokenizer, self._settings, self._clock, metrics or NoMetrics(), self._overload
        )
        self._calls.loops = self._loops
        self._tenure = Tenure(self._calls, self._settings, self._clock)

    async def run(self) -> None:
        """Runs the frame loop until `stop`, or until a stage dies: then `fault` says which, nothing is raised."""
        self._loops_gone.clear()
        work = (self._loops.encode, self._loops.converse, self._loops.decode, self._tenure.watch)
        loops = [asyncio.create_task(loop()) for loop in work]
        halt = asyncio.create_task(self._halt.wait())
        try:
            done, _ = await asyncio.wait([*loops, halt], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None:
                    self._stages.fail("frame loop", error)  # changes nothing if a stage's death has ended it
        finally:
            for task in (*loops, halt):
                task.cancel()
            await asyncio.gather(*loops, halt, return_exceptions=True)
            self._loops_gone.set()

    async def stop(self, reason: str = "The replica is shutting down.") -> None:
        """Ends every call, frees every slot, ends the loop."""
        self._tenure.draining = True
        for call in list(self._calls):
            self._calls.end(call, Draining(reason))
        await self._calls.all_ended()
        self._halt.set()
        await self._loops_gone.wait()

    def drain(self) -> None:
        """Takes no new conversations from now on, and asks that those that are here be taken elsewhere, again and
        again; they go on until they are. Twice is no more than once."""
        if not self._tenure.draining:
            self._tenure.drain()
            self._calls.on_change()

    async def probe(self) -> None:
        """Asks all three stages for nothing at all, so that one that died while nobody talked is noticed: `fault`."""
        await self._stages.close("", 0)  # of no conversation; a stage that cannot answer even that has failed

    def revive(self, encoder: CodecHandle, converse: ConverseHandle, decoder: CodecHandle) -> None:
        """Begins anew with stages that hold nothing, after a fault and when `run` has returned; then run it again."""
        if self.fault is None or not self._loops_gone.is_set():
            raise RuntimeError("a replica is revived after its fault, when its loops have ended")
        self._loops.clear()
        self._calls.memory = None
        self._stages.replace(encoder, converse, decoder)
        self._halt.clear()
        self._calls.on_change()

    def renewed(self, at_s: float, lease_s: float) -> None:
        """The router has answered the report that was sent at `at_s`: see actors.tenure."""
        self._tenure.renewed(at_s, lease_s)

    # ---- what the ingress asks for --------------------------------------------------------------------------

    async def open(self, request: OpenRequest, sink: DownSink, journal: Journal | None = None) -> None:
        """Takes a slot and opens the three stages; Ready, or Failed, comes through `sink` once the prompt is in, and
        with a `journal` once all three stand where it ends: it is then this call's journal, going on.

        Asked again with the same epoch it changes nothing but the sink, and Ready is told again. A higher epoch
        takes over: the former call ends with Failed("stale_epoch"), or, where the request says `adopt`, it goes on for
        its new owner, who is sent its journal before Ready. Raises ServingError: NoCapacity, Draining, StaleEpoch,
        UnknownSession (nothing to adopt), JournalError, EngineLost, or what the stages say about the request.
        Cancelled, it leaves nothing behind.
        """
        while (known := self._calls.get(request.session)) or self._calls.ending(request.session):
            if known is None:
                await self._calls.ended(request.session)
            elif request.epoch < known.epoch:
                raise StaleEpoch(f"The conversation is at epoch {known.epoch}, not {request.epoch}.")
            elif request.epoch == known.epoch or request.adopt:
                self._calls.hand_over(known, request, sink)
                return await self._calls.opened(known)
            else:
                self._calls.end(known, StaleEpoch(f"The conversation was taken over at epoch {request.epoch}."))
        if self.fault is not None:
            raise self.fault
        if request.adopt:
            raise UnknownSession(f"Conversation {request.session} is not held here any more.")
        if self._tenure.draining:
            raise Draining("This replica takes no new conversations.")
        exact = journal is None or continues(journal, request, self.numerics_id)
        if journal is None:
            journal = Journal(request.session, request.spec, self._settings.receptive_s)
        call = self._calls.enter(request, sink, journal, exact=exact)
        self._overload.came()
        try:
            await self._calls.opened(call)
        except asyncio.CancelledError:
            if call.sink == sink:  # else somebody else has it by now, or it waits for somebody
                self._calls.end(call, None)  # whoever asked is gone
            raise

    def offer(self, frame: FrameIn) -> None:
        """Takes a frame, without waiting. Offered again, it is answered again or left under way; too early, or
        beyond the bound on frames in flight, its sink gets Need with the frame that is due.

        Raises UnknownSession, StaleEpoch, BadRequest, EngineLost: whoever sent it is not, or no longer, served here.
        """
        call = self._calls.get(frame.key.session)
        if call is None or frame.key.epoch > call.epoch:
            raise self.fault or UnknownSession(f"Conversation {frame.key.session} is not held here.")
        if frame.key.epoch < call.epoch:
            raise StaleEpoch(f"The conversation is at epoch {call.epoch}, not {frame.key.epoch}.")
        early = call.ready is None
        bound = self._settings.early_frames if early else self._settings.frames_in_flight
        flight = call.accept(frame, bound, self._clock.now(), lambda message: self._calls.tell(call, message))
        if flight is not None and early:
            call.early.append(flight)
        elif flight is not None:
            self._loops.hear(flight)

    async def close(self, session: str, epoch: int, reason: str, sink: DownSink | None = None) -> None:
        """Ends a call at once, frames in flight included, and returns when its slot is free. Closing what is not
        there, an epoch that is over, or what belongs to another sink than the one given, does nothing."""
        call = self._calls.get(session)
        if call is not None and call.epoch <= epoch and (sink is None or sink == call.sink):
            log.info("session %s epoch %d closed: %s", session, call.epoch, reason)
            self._calls.end(call, None)
        await self._calls.ended(session)

    def leave(self, session: str, epoch: int, sink: DownSink) -> None:
        """The trunk behind `sink` is lost. A conversation that its client can resume waits for that; any other ends.
        One that belongs to another sink by now is left alone."""
        call = self._calls.get(session)
        if call is None or call.epoch != epoch or call.sink != sink:
            return
        if call.request.resumable:
            log.info("session %s epoch %d lost its ingress and waits to be resumed", session, epoch)
            call.orphaned(self._clock.now())
            self._calls.on_change()
        else:
            log.info("session %s epoch %d closed: its ingress is lost", session, epoch)
            self._overload.owe(self._clock.now())
            self._calls.end(call, None)

    def revoke(self, session: str, epoch: int, reason: str) -> None:
        """Ends a call that is not its owner's any more, if it is still at this epoch or an earlier one."""
        call = self._calls.get(session)
        if call is not None and call.epoch <= epoch:
            self._calls.end(call, StaleEpoch(reason))

    def _lose_all(self, fault: EngineLost) -> None:
        for call in list(self._calls):
            self._calls.end(call, fault)
        self._halt.set()
        self._calls.on_change()

    # ---- what is known of it --------------------------------------------------------------------------------

    def on_change(self, tell: Callable[[], None]) -> None:
        """`tell` is called whenever somebody comes, goes, becomes ready or changes hands, and when a stage dies."""
        self._calls.on_change = tell

    @property
    def fault(self) -> EngineLost | None:
        """What killed it."""
        return self._stages.fault

    @property
    def failed_stage(self) -> str | None:
        """'encoder', 'engine' or 'decoder', where it is known which one began it."""
        return self._stages.failed

    @property
    def healthy(self) -> bool:
        return self.fault is None

    @property
    def admitting(self) -> bool:
        return self.healthy and not self._tenure.draining

    @property
    def drained(self) -> bool:
        """Whether it was to be emptied, and is empty."""
        return self._tenure.draining and self.busy == 0

    @property
    def slots(self) -> int:
        return self._calls.slots.slots

    @property
    def busy(self) -> int:
        """Slots that are held, those being freed included."""
        return self._calls.slots.busy

    @property
    def room(self) -> int:
        """Slots that may still be given away: the free ones, as far as frames would stay in time (actors.overload) and
        the engine's memory has room (graphs.kv_pressure)."""
        free = self.slots - self.busy
        memory = self._calls.memory
        if memory is not None:
            free = min(free, memory.room)
        return self._overload.room(self._clock.now(), self.busy, free)

    def report(self) -> list[SlotReport]:
        """The conversations held, by slot."""
        return self._calls.report()

    def journal(self, session: str, epoch: int) -> Journal:
        """The replica's copy of a conversation's journal. Raises UnknownSession."""
        return self._calls.held(session, epoch).journal

"""One GPU's (or CPU's) slots: the conversations that hold them, around the frame loop of actors.stage_loop.

A frame's way: `offer` → encoder → engine → decoder → the conversation's sink.

Plain asyncio, no Ray: a stage is anything with awaitable open, step and close. When one of them fails, the state of
every conversation is gone: each gets Failed("engine_lost") and the replica is unhealthy for good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from actors.call import Call
from actors.errors import BadRequest, Draining, EngineLost, ServingError, StaleEpoch, UnknownSession
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
from actors.messages import Down, DownSink, Failed, FrameIn, OpenRequest, Ready, SlotReport
from actors.slots import SlotTable
from actors.stage_loop import StageLoops
from actors.stage_set import StageSet

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
        self._slots = SlotTable(slots)
        self._calls: dict[str, Call] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}  # session → its slot being freed
        self._draining = False
        self._halt = asyncio.Event()
        self._loops_gone = asyncio.Event()
        self._loops_gone.set()
        self._stages = StageSet(
            encoder, converse, decoder, self._clock, self._settings.stage_timeout_s, on_fault=self._lose_all
        )
        self._loops = StageLoops(self._stages, self, tokenizer, self._settings, self._clock, metrics or NoMetrics())

    async def run(self) -> None:
        """Runs the frame loop until `stop`, or until a stage dies: then `fault` says which, nothing is raised."""
        self._loops_gone.clear()
        loops = [asyncio.create_task(loop()) for loop in (self._loops.encode, self._loops.converse, self._loops.decode)]
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
        self.drain()
        for call in list(self._calls.values()):
            self.end(call, Draining(reason))
        while self._endings:
            await asyncio.wait(self._endings.values())
        self._halt.set()
        await self._loops_gone.wait()

    def drain(self) -> None:
        """Takes no new conversations from now on; those that are here go on."""
        self._draining = True

    async def probe(self) -> None:
        """Asks all three stages for nothing at all, so that one that died while nobody talked is noticed: `fault`."""
        await self._stages.close("", 0)  # of no conversation; a stage that cannot answer even that has failed

    # ---- what the ingress asks for --------------------------------------------------------------------------

    async def open(self, request: OpenRequest, sink: DownSink) -> None:
        """Takes a slot and opens the three stages; Ready, or Failed, comes through `sink` once the prompt is in.

        Asked again with the same epoch it changes nothing but the sink, and Ready is told again. A higher epoch
        takes over: the former call ends with Failed("stale_epoch"). Raises ServingError: NoCapacity, Draining,
        StaleEpoch, EngineLost, or what the stages say about the request. Cancelled, it leaves nothing behind.
        """
        while (known := self._calls.get(request.session)) or request.session in self._endings:
            if known is None:
                await asyncio.shield(self._endings[request.session])
            elif request.epoch < known.epoch:
                raise StaleEpoch(f"The conversation is at epoch {known.epoch}, not {request.epoch}.")
            elif request.epoch > known.epoch:
                self.end(known, StaleEpoch(f"The conversation was taken over at epoch {request.epoch}."))
            else:
                known.sink = sink
                if known.ready is not None:
                    self.tell(known, known.ready)
                return await self._opened(known)
        if self.fault is not None:
            raise self.fault
        if self._draining:
            raise Draining("This replica takes no new conversations.")
        lease = self._slots.acquire(request.session, request.epoch, request.tenant)
        journal = Journal(request.session, request.spec, self._settings.receptive_s)
        call = self._calls[request.session] = Call(request, sink, lease, journal, self._clock.now())
        call.opening = asyncio.create_task(self._open_stages(call))
        try:
            await self._opened(call)
        except asyncio.CancelledError:
            self.end(call, None)  # whoever asked is gone
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
        flight = call.accept(frame, bound, self._clock.now(), lambda message: self.tell(call, message))
        if flight is not None and early:
            call.early.append(flight)
        elif flight is not None:
            self._loops.hear(flight)

    async def close(self, session: str, epoch: int, reason: str) -> None:
        """Ends a call at once, frames in flight included, and returns when its slot is free. Closing what is not
        there, or an epoch that is over, does nothing."""
        call = self._calls.get(session)
        if call is not None and call.epoch <= epoch:
            log.info("session %s epoch %d closed: %s", session, call.epoch, reason)
            self.end(call, None)
        if (ending := self._endings.get(session)) is not None:
            await asyncio.shield(ending)

    # ---- a call's stations ----------------------------------------------------------------------------------

    async def _open_stages(self, call: Call) -> None:
        """Opens the stages and ends the call if one refuses; `_opened` tells the opener."""
        try:
            asked = call.request
            prompt = await self._stages.open(call.session, call.epoch, call.lease.slot, asked.spec, asked.tenant)
        except ServingError as refusal:
            self.end(call, refusal)
        else:
            call.prompt = prompt
            self._become_ready(call)
            self._loops.prompt_waits()

    async def _opened(self, call: Call) -> None:
        """Returns when the call is open; raises why it is not, once its slot is free again."""
        assert call.opening is not None
        await asyncio.shield(call.opening)
        if call.ending is not None:
            await asyncio.shield(call.ending)
            raise call.failure or UnknownSession("The conversation was closed before it was open.")

    def prompts(self, ready: Iterable[tuple[str, int]], failed: Iterable[tuple[str, int, str]]) -> None:
        """What an engine step said about prompts; known news and news of calls that have ended change nothing."""
        for session, epoch in ready:
            if (call := self._call(session, epoch)) is not None:
                call.primed = True
                self._become_ready(call)
        for session, epoch, reason in failed:
            if (call := self._call(session, epoch)) is not None:
                self.end(call, BadRequest(reason))

    def _become_ready(self, call: Call) -> None:
        """Tells Ready once the stages are open and the prompt is in, whichever is known last."""
        if call.closed or call.ready is not None or call.prompt is None or not call.primed:
            return
        now = self._clock.now()
        call.ready = Ready(
            session=call.session,
            epoch=call.epoch,
            slot=call.lease.slot,
            prompt_frames=call.prompt.frames,
            prompt_hash=call.prompt.digest,
            ready_ms=(now - call.asked_s) * 1000.0,
            numerics_id=self.numerics_id,
        )
        call.journal.begin(call.prompt.digest, call.prompt.frames, self.numerics_id)
        self.tell(call, call.ready)
        while call.early:
            flight = call.early.popleft()
            flight.arrived_s = now  # the deadline of a frame that had to wait for the prompt counts from here
            self._loops.hear(flight)

    def end(self, call: Call, failure: ServingError | None) -> None:
        """Takes a call out at once; its slot follows when all three stages have let go of it.

        `failure` is told to the sink, or, as long as the call is not open, raised to the opener.
        """
        if call.closed:
            return
        call.closed, call.failure = True, failure
        del self._calls[call.session]
        call.early.clear()
        self._loops.drop(call)
        call.ending = self._endings[call.session] = asyncio.create_task(self._let_go(call))
        if failure is not None and call.prompt is not None:
            self.tell(call, Failed(call.session, call.epoch, failure.code, failure.message))

    async def _let_go(self, call: Call) -> None:
        """Closes the stages, then frees the slot: its next owner opens only after the last of this one's writes."""
        if call.opening is not None:
            await asyncio.wait({call.opening})
        await self._stages.close(call.session, call.epoch)
        self._slots.release(call.lease)
        del self._endings[call.session]

    def tell(self, call: Call, message: Down) -> None:
        """Hands a message to the ingress's sink. A sink that raises loses its own conversation, nobody else's."""
        try:
            call.sink(message)
        except Exception:
            log.exception("the sink of session %s failed", call.session)
            self.end(call, None)

    def _lose_all(self, fault: EngineLost) -> None:
        for call in list(self._calls.values()):
            self.end(call, fault)
        self._halt.set()

    def _call(self, session: str, epoch: int) -> Call | None:
        call = self._calls.get(session)
        return call if call is not None and call.epoch == epoch else None

    # ---- what is known of it --------------------------------------------------------------------------------

    @property
    def fault(self) -> EngineLost | None:
        """What killed it."""
        return self._stages.fault

    @property
    def healthy(self) -> bool:
        return self.fault is None

    @property
    def admitting(self) -> bool:
        return self.healthy and not self._draining

    @property
    def slots(self) -> int:
        return self._slots.slots

    @property
    def busy(self) -> int:
        """Slots that are held, those being freed included."""
        return self._slots.busy

    def calls(self) -> Iterable[Call]:
        return self._calls.values()

    def report(self) -> list[SlotReport]:
        """The conversations held, by slot."""
        return [call.report() for call in sorted(self._calls.values(), key=lambda call: call.lease.slot)]

    def deadline_misses(self) -> dict[int, int]:
        """Slot → frames that took longer than 80 ms, of the conversation that holds it now."""
        return {call.lease.slot: call.misses for call in self._calls.values()}

    def journal(self, session: str, epoch: int) -> Journal:
        """The replica's copy of a conversation's journal. Raises UnknownSession."""
        call = self._call(session, epoch)
        if call is None:
            raise UnknownSession(f"Conversation {session} is not held here at epoch {epoch}.")
        return call.journal

"""The conversations of one replica: who holds which slot, what brings each of them to Ready, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from actors.call import Call
from actors.errors import BadRequest, JournalError, ServingError, StaleEpoch, UnknownSession
from actors.interfaces import Clock
from actors.journal import Journal
from actors.journal_parts import cut
from actors.messages import Down, DownSink, Failed, Move, OpenRequest, Ready, SlotReport
from actors.slots import SlotTable
from actors.stage_loop import StageLoops
from actors.stage_set import Pasts, StageSet
from graphs.stages import MemoryReport

log = logging.getLogger(__name__)


class Calls:
    """The one place where calls come and go. An actors.stage_loop.CallBook."""

    def __init__(self, slots: int, stages: StageSet, clock: Clock, numerics_id: str) -> None:
        self.slots = SlotTable(slots)
        self.loops: StageLoops  # set once both exist
        self.on_change: Callable[[], None] = lambda: None  # somebody came, went, became ready or changed hands
        self._stages, self._clock, self._numerics_id = stages, clock, numerics_id
        self._calls: dict[str, Call] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}  # session → its slot being freed
        self.memory: MemoryReport | None = None  # what the engine last said, if its slots share memory

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls.values())

    def get(self, session: str) -> Call | None:
        return self._calls.get(session)

    def held(self, session: str, epoch: int) -> Call:
        """Raises UnknownSession."""
        call = self._calls.get(session)
        if call is None or call.epoch != epoch:
            raise UnknownSession(f"Conversation {session} is not held here at epoch {epoch}.")
        return call

    # ---- coming ---------------------------------------------------------------------------------------------

    def enter(self, request: OpenRequest, sink: DownSink, journal: Journal, *, exact: bool) -> Call:
        """Takes a slot and begins to open the stages; `opened` waits for them. Raises NoCapacity."""
        lease = self.slots.acquire(request.session, request.epoch, request.tenant)
        call = self._calls[request.session] = Call(request, sink, lease, journal, self._clock.now())
        call.exact = exact
        call.opening = asyncio.create_task(self._open_stages(call))
        self.on_change()
        return call

    async def opened(self, call: Call) -> None:
        """Returns when the call is open; raises why it is not, once its slot is free again."""
        assert call.opening is not None
        await asyncio.shield(call.opening)
        if call.ending is not None:
            await asyncio.shield(call.ending)
            raise call.failure or UnknownSession("The conversation was closed before it was open.")

    def hand_over(self, call: Call, request: OpenRequest, sink: DownSink) -> None:
        """Gives a call that is here to whoever asks: its owner on another trunk, or the ingress where it is resumed.

        Raises UnknownSession for another tenant's, whom it is none of their business that it is here.
        """
        if request.tenant != call.request.tenant:
            raise UnknownSession(f"Conversation {request.session} is not held here any more.")
        former, epoch = call.sink, call.epoch
        call.owned_by(request, sink)
        call.wants_journal = request.adopt
        if request.epoch > epoch:
            call.asked_s = self._clock.now()
            over = StaleEpoch(f"The conversation was taken over at epoch {request.epoch}.")
            _say(former, Failed(call.session, epoch, over.code, over.message))
        self.on_change()
        if call.ready is not None:
            self._tell_ready(call)

    async def _open_stages(self, call: Call) -> None:
        """Opens the stages and ends the call if one refuses; `opened` tells the opener."""
        asked, pasts = call.request, None
        try:
            if call.continued:
                pasts = Pasts(call.journal.past(), *call.journal.codec_pasts())
                # Known before the stages are asked: another call's turn may finish this one's stream while the last of
                # them is still being opened.
                streams = {"encoder": pasts.encoder, "decoder": pasts.decoder}
                call.rebuilding = {stage for stage, past in streams.items() if len(past.rows)}
            prompt, exact = await self._stages.open(
                call.session, call.tenancy, call.lease.slot, asked.spec, asked.tenant, pasts
            )
            if call.journal.prompt_hash not in ("", prompt.digest):
                raise JournalError("This conversation's voice or role is another one on this replica.")
        except ServingError as refusal:
            self.end(call, refusal)
            return
        call.prompt = prompt
        call.exact = call.exact and exact
        self._become_ready(call)
        self.loops.work_waits()

    # ---- becoming ready -------------------------------------------------------------------------------------

    def prompts(self, ready: Iterable[tuple[str, int]], failed: Iterable[tuple[str, int, str]]) -> None:
        """What an engine step said about prompts; known news and news of calls that have ended change nothing."""
        for session, tenancy in ready:
            if (call := self._tenant(session, tenancy)) is not None:
                call.primed = True
                self._become_ready(call)
                held, call.held = call.held, []
                self.loops.go_on(held)
        for session, tenancy, reason in failed:
            if (call := self._tenant(session, tenancy)) is not None:
                self.end(call, BadRequest(reason))

    def remembers(self, memory: MemoryReport) -> None:
        """What the engine says about its memory. Whoever it suggests is asked to leave, half a second after half a
        second, as on a drain: their ingresses move them while they talk."""
        self.memory = memory
        for session, tenancy in memory.migrate:
            if (call := self._tenant(session, tenancy)) is not None and call.ready is not None:
                self.tell(call, Move(call.session, call.epoch, "pressure"))

    def rebuilt(self, stage: str, ready: Iterable[tuple[str, int]]) -> None:
        """Whose stream in a codec stage stands where it stood."""
        for session, tenancy in ready:
            if (call := self._tenant(session, tenancy)) is not None:
                call.rebuilding.discard(stage)
                self._become_ready(call)

    def _become_ready(self, call: Call) -> None:
        """Tells Ready once the stages are open, the prompt is in and the past rebuilt, whichever is known last."""
        if call.closed or call.ready is not None or call.prompt is None or not call.primed or call.rebuilding:
            return
        now_s = self._clock.now()
        call.ready = Ready(
            session=call.session,
            epoch=call.epoch,
            slot=call.lease.slot,
            prompt_frames=call.prompt.frames,
            prompt_hash=call.prompt.digest,
            ready_ms=(now_s - call.asked_s) * 1000.0,
            numerics_id=self._numerics_id,
            exact=call.exact,
        )
        call.journal.begin(call.prompt.digest, call.prompt.frames, self._numerics_id)
        self._tell_ready(call)
        while call.early:
            flight = call.early.popleft()
            flight.arrived_s = now_s  # the deadline of a frame that had to wait for the prompt counts from here
            self.loops.hear(flight)
        self.on_change()

    def _tell_ready(self, call: Call) -> None:
        """Ready as it is now, and before it the journal where its owner has none."""
        assert call.ready is not None
        if call.wants_journal:
            call.wants_journal = False
            for part in cut(call.session, call.epoch, call.journal.to_bytes()):
                self.tell(call, part)
        self.tell(call, replace(call.ready, epoch=call.epoch, next_frame=call.journal.next_frame))

    def _tenant(self, session: str, tenancy: int) -> Call | None:
        """The call that a stage means: it knows the epoch under which it was opened."""
        call = self._calls.get(session)
        return call if call is not None and call.tenancy == tenancy else None

    # ---- going ----------------------------------------------------------------------------------------------

    def end(self, call: Call, failure: ServingError | None) -> None:
        """Takes a call out at once; its slot follows when all three stages have let go of it.

        `failure` is told to the sink, or, as long as the call is not open, raised to the opener.
        """
        if call.closed:
            return
        call.closed, call.failure = True, failure
        del self._calls[call.session]
        call.early.clear()
        call.held.clear()
        self.loops.drop(call)
        call.ending = self._endings[call.session] = asyncio.create_task(self._let_go(call))
        if failure is not None and call.prompt is not None:
            self.tell(call, Failed(call.session, call.epoch, failure.code, failure.message))
        self.on_change()

    async def ended(self, session: str) -> None:
        """Returns when the slot that this session has given up, if it has, is free."""
        if (ending := self._endings.get(session)) is not None:
            await asyncio.shield(ending)

    async def all_ended(self) -> None:
        while self._endings:
            await asyncio.wait(self._endings.values())

    def ending(self, session: str) -> bool:
        return session in self._endings

    async def _let_go(self, call: Call) -> None:
        """Closes the stages, then frees the slot: its next owner opens only after the last of this one's writes.

        The stages close what the call was under its last epoch, so that no earlier one can open there again.
        """
        if call.opening is not None:
            await asyncio.wait({call.opening})
        await self._stages.close(call.session, call.epoch)
        self.slots.release(call.lease)
        del self._endings[call.session]
        self.memory = None  # there is more of it now; nobody may ever take a step here again to say how much
        if any(other.held for other in self):
            self.loops.look_again()
        self.on_change()

    def tell(self, call: Call, message: Down) -> None:
        """Hands a message to the ingress's sink. A sink that raises loses its own conversation, nobody else's."""
        if not _say(call.sink, message):
            self.end(call, None)

    def report(self) -> list[SlotReport]:
        """The conversations held, by slot."""
        return [call.report() for call in sorted(self, key=lambda call: call.lease.slot)]


def _say(sink: DownSink, message: Down) -> bool:
    try:
        sink(message)
    except Exception:
        log.exception("a sink could not take a %s", type(message).__name__)
        return False
    return True

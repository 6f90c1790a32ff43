"""The frame loop of a replica: encode → converse → decode, side by side, every stage one batch at a time.

A frame's budget is 80 ms from its arrival to its answer: the batching window, three calls, and whatever it waits
while a stage is at the batch before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from actors.call import Call
from actors.errors import ConversationBroken, ServingError, StaleEpoch
from actors.flight import Flight, FrameQueue, Rows, batch_of
from actors.interfaces import Clock, CodecHandle, FrameMetrics, Pieces, ReplicaSettings
from actors.messages import Down, FrameOut
from actors.overload import Overload
from actors.stage_set import StageSet
from graphs.stages import MemoryReport, StageReply, Verdict

FRAME_S = 0.08


class CallBook(Protocol):
    """What the loop needs of the replica: who is here, and what to do with what it finds."""

    def __iter__(self) -> Iterator[Call]: ...

    def prompts(self, ready: Iterable[tuple[str, int]], failed: Iterable[tuple[str, int, str]]) -> None: ...

    def remembers(self, memory: MemoryReport) -> None: ...

    def rebuilt(self, stage: str, ready: Iterable[tuple[str, int]]) -> None: ...

    def tell(self, call: Call, message: Down) -> None: ...

    def end(self, call: Call, failure: ServingError | None) -> None: ...


class StageLoops:
    def __init__(
        self,
        stages: StageSet,
        book: CallBook,
        tokenizer: Pieces,
        settings: ReplicaSettings,
        clock: Clock,
        metrics: FrameMetrics,
        overload: Overload,
    ) -> None:
        self._stages, self._book, self._tokenizer = stages, book, tokenizer
        self._settings, self._clock, self._metrics, self._overload = settings, clock, metrics, overload
        self._heard, self._encoded, self._spoken = FrameQueue(), FrameQueue(), FrameQueue()
        self._pending = 0  # what the engine said it has still to read
        # From when on a stage works on pasts although frames wait.
        self._next_piece_s = {"encoder": -math.inf, "decoder": -math.inf}

    # ---- the loop ----------------------------------------------------------------------------------------

    async def encode(self) -> None:
        while True:
            await self._company()
            if flights := self._heard.take():  # none while only rebuilds wait
                reply = await self._stages.call("encoder", self._stages.encoder.step, batch_of(flights, 1920))
                for flight, codes in self._answers("encoder", flights, reply):
                    flight.row = flight.user_codes = codes
                    self._encoded.put(flight)
                    self._stages.converse.hurry()
            await self._rebuild("encoder", self._stages.encoder, self._heard)

    async def converse(self) -> None:
        while True:
            await self._encoded.wait(or_when=self._prefilling)
            flights = self._not_held(self._encoded.take())  # none while only prompts wait: then the step just prefills
            reply = await self._stages.call("engine", self._stages.converse.step, batch_of(flights, 8))
            place = {key: i for i, key in enumerate(reply.frames.keys)}
            for flight, tokens in self._answers("engine", flights, reply.frames):
                flight.text_token, flight.agent_codes = int(tokens[0]), tokens[1:]
                i, flight.row = place[flight.key], flight.agent_codes
                flight.journal_row, flight.next_column = reply.journal[i].copy(), reply.next_columns[i].copy()
                flight.first_row = int(reply.first_rows[i])
                self._spoken.put(flight)
                self._stages.decoder.hurry()
            # After the answers: a frame that had to wait goes on with the reply that says so.
            self._book.prompts(reply.ready, reply.failed)
            self._pending = reply.pending
            if reply.memory is not None:
                self._book.remembers(reply.memory)

    async def decode(self) -> None:
        while True:
            await self._spoken.wait(or_when=lambda: self._rebuilding("decoder"))
            if flights := self._spoken.take():
                reply = await self._stages.call("decoder", self._stages.decoder.step, batch_of(flights, 8))
                for flight, pcm in self._answers("decoder", flights, reply):
                    self._emit(flight, pcm)
            await self._rebuild("decoder", self._stages.decoder, self._spoken)

    async def _rebuild(self, stage: str, codec: CodecHandle, frames: FrameQueue) -> None:
        """A piece of what calls with a past wait for, no longer than the frames that come meanwhile can wait. Where
        some wait already, one piece a frame's time, so that there is progress."""
        now_s, waits = self._clock.now(), len(frames) > 0
        if not self._rebuilding(stage) or (waits and now_s < self._next_piece_s[stage]):
            return
        self._next_piece_s[stage] = now_s + FRAME_S
        live = any(call.ready is not None for call in self._book)
        budget_s = self._settings.rebuild_live_s if live else self._settings.rebuild_idle_s
        reply = await self._stages.call(stage, codec.rebuild, budget_s, behind=not waits)
        self._book.rebuilt(stage, reply.ready)

    def _emit(self, flight: Flight, pcm: Rows) -> None:
        """The frame's last step: counted against its deadline, noted, and handed to the ingress."""
        call, now_s = flight.call, self._clock.now()
        frame_ms = (now_s - flight.arrived_s) * 1000.0
        if call.caught_up:  # else its frames are late for what happened elsewhere
            self._overload.observe(now_s, sum(call.ready is not None for call in self._book), frame_ms)
        self._metrics.observe_frame_ms(frame_ms)
        if frame_ms > FRAME_S * 1000.0:
            self._metrics.deadline_miss(call.lease.slot)
        out = FrameOut(
            key=call.key(flight.key.frame),
            pcm=pcm,
            text_token=flight.text_token,
            text=self._tokenizer.piece(flight.text_token),
            codes=flight.agent_codes,
            user_codes=flight.user_codes,
            journal_row=flight.journal_row,
            replica_ms=frame_ms,
            next_column=flight.next_column,
            first_row=flight.first_row,
        )
        try:
            call.answered(out)
        except ServingError as full:  # a journal that cannot grow any more ends its own call, not the loop
            self._book.end(call, full)
        else:
            self._book.tell(call, out)

    # ---- what it is made of --------------------------------------------------------------------------------

    def hear(self, flight: Flight) -> None:
        """A frame of the user, to be answered."""
        self._heard.put(flight)
        self._stages.encoder.hurry()

    def work_waits(self) -> None:
        """Wakes the loops: a call has opened, with a prompt to read and perhaps a past to rebuild."""
        for queue in (self._heard, self._encoded, self._spoken):
            queue.ring()

    def clear(self) -> None:
        """Forgets all frames; for a replica whose stages have been replaced."""
        self._pending = 0
        for queue in (self._heard, self._encoded, self._spoken):
            queue.clear()

    def drop(self, call: Call) -> None:
        """Forgets a call's waiting frames. What a stage is at right now is dropped when it comes back."""
        for queue in (self._heard, self._encoded, self._spoken):
            queue.drop(call)

    def waiting(self) -> int:
        """Frames in all queues."""
        return len(self._heard) + len(self._encoded) + len(self._spoken)

    def _not_held(self, flights: list[Flight]) -> list[Flight]:
        """Those whose call is not parked; the frames of one that is queue up behind the first that had to wait."""
        for flight in flights:
            if flight.call.held:
                flight.call.held.append(flight)
        return [flight for flight in flights if not flight.call.held]

    def go_on(self, held: Sequence[Flight]) -> None:
        """Frames that the engine had no memory for, and now has."""
        if held:
            self._encoded.put_back(held)

    def look_again(self) -> None:
        """Memory may have become free: the engine is called once even if no frame comes."""
        self._pending = max(self._pending, 1)
        self._encoded.ring()

    def _prefilling(self) -> bool:
        """Whether the engine has something to read: prompts, and calls that it had parked and is rebuilding."""
        return self._pending > 0 or any(call.prefilling for call in self._book)

    def _rebuilding(self, stage: str) -> bool:
        return any(call.rebuilds_in(stage) for call in self._book)

    async def _company(self) -> None:
        """Waits for a frame, then for those of the others that are due within the window. Returns without one when
        there is a rebuild to work on."""
        window_s = self._settings.window_s
        while True:
            await self._heard.wait(or_when=lambda: self._rebuilding("encoder"))
            if not len(self._heard):
                return
            until = self._clock.now() + window_s
            while (now := self._clock.now()) < until and any(self._due(call, now) for call in self._book):
                try:
                    await self._clock.wait_for(self._heard.rung(), until - now)
                except TimeoutError:
                    break
            if len(self._heard):  # the one it began with may have been closed meanwhile
                return

    def _due(self, call: Call, now: float) -> bool:
        """Whether this call's next frame should come within the window. One that was just served is not due, and
        one whose client has fallen silent makes nobody wait."""
        if call.last_in_s is None or call.ready is None or self._heard.has(call):
            return False
        return FRAME_S - self._settings.window_s <= now - call.last_in_s <= 2 * FRAME_S

    def _answers(self, stage: str, flights: list[Flight], reply: StageReply) -> Iterator[tuple[Flight, Rows]]:
        """The frames that go on, each with its row, a copy. A refusal ends that one conversation; a frame whose
        conversation was closed while the stage was at it goes nowhere."""
        self._metrics.batch_size(stage, len(flights))
        for i, (flight, verdict) in enumerate(zip(flights, reply.verdicts, strict=True)):
            if flight.call.closed:
                continue
            if verdict in (Verdict.DONE, Verdict.REPLAYED):
                yield flight, reply.data[i].copy()
            elif verdict is Verdict.NEED and stage == "engine" and reply.details[i] == flight.key.frame:
                flight.call.held.append(flight)  # parked: see graphs.stages.MemoryReport
            elif verdict is Verdict.STALE:
                self._book.end(flight.call, StaleEpoch(f"The conversation is at epoch {reply.details[i]} now."))
            else:
                what = f"The {stage} answered frame {flight.key.frame} with {verdict.name}."
                self._book.end(flight.call, ConversationBroken(what))

"""One live conversation as its ingress sees it: numbering, pace, bounds, journal; what a protocol handler talks to.

Where it is computed is its residence's business (serving/residence.py): homes die and are left, and what shows of it
here is a pause at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from actors.errors import BadRequest, ClientFault, ConversationBroken, IdleClient, ServingError, SlowClient
from actors.interfaces import Clock
from actors.journal import RECEPTIVE_S, Journal
from actors.messages import FrameOut, Ready
from graphs.stages import Pcm, SessionSpec
from serving.apart import Elsewhere
from serving.holding import Holding
from serving.home import MAX_IN_FLIGHT, Home
from serving.output_queue import SILENT, CatchUp, OutputQueue
from serving.pace import Pace
from serving.relocation import TrunkSource
from serving.residence import Residence
from serving.resume import Adopted, Missed, Replay
from serving.settings import FRAME_S, ServeSettings
from serving.telemetry import ConversationTrace


class Conversation:
    """One live conversation. One task sends, one reads frames; any may watch."""

    def __init__(
        self,
        journal: Journal,
        holding: Holding,
        trunks: TrunkSource,
        settings: ServeSettings,
        trace: ConversationTrace,
        clock: Clock,
        elsewhere: Elsewhere,
        *,
        codec_s: float = RECEPTIVE_S,
    ) -> None:
        self.journal = journal
        self.holding = holding
        self.residence = Residence(self, journal, holding, trunks, clock, settings.recovery_s, codec_s, elsewhere)
        self.first_frame = 0  # that this client is to get; those before it have been another's, or its own before
        self.left = asyncio.Event()  # set by the hub: nothing is left of it
        self._settings = settings
        self._trace = trace
        self._clock = clock
        self._ready: Ready | None = None
        self._failure: ServingError | None = None
        self._over = asyncio.Event()  # ended or failed
        self._news = asyncio.Event()  # set once, then replaced: see wake
        self._queue = self._new_queue()
        self._late = CatchUp()
        self._replay = Replay()
        self._unheard = 0  # frames before this one were missed, and are not to be heard any more
        self._parked = self._deserted = False
        self._pace = Pace(settings.ahead_frames, MAX_IN_FLIGHT, clock.now())
        self._last_input_s = clock.now()

    @property
    def session(self) -> str:
        return self.journal.session

    @property
    def spec(self) -> SessionSpec:
        return self.journal.spec

    @property
    def epoch(self) -> int:
        return self.holding.epoch

    @property
    def over(self) -> bool:
        return self._over.is_set()

    @property
    def frames_sent(self) -> int:
        return self.journal.heard_frames

    @property
    def frames_answered(self) -> int:
        return self.journal.next_frame

    # What a protocol handler does

    async def ready(self) -> Ready:
        """Wait until the prompt is in the KV cache. Raises what the replica says against it."""
        deadline_s = self._clock.now() + self._settings.ready_timeout_s
        while self._ready is None:
            self._raise_if_over()
            try:
                await self._clock.wait_for(self.news(), deadline_s - self._clock.now())
            except TimeoutError:
                self.fail(ConversationBroken(f"The prompt took longer than {self._settings.ready_timeout_s:g} s."))
        return self._ready

    async def send(self, pcm: Pcm) -> None:
        """Hand over 80 ms of the user: [1920] int16, 24 kHz mono.

        Waits for the prompt, for its turn when the client is more than `ahead_frames` ahead of real time, and for
        the replica when 2 s are in flight. Nothing is dropped. Raises when the conversation is over.
        """
        if pcm.shape != (1920,) or pcm.dtype.kind != "i" or pcm.dtype.itemsize != 2:
            raise BadRequest(f"A frame is [1920] int16, not {list(pcm.shape)} {pcm.dtype}.")
        self._last_input_s = self._clock.now()
        await self.ready()
        while (wait_s := self._pace.take(self._clock.now())) > 0:
            await self._sleep(wait_s)
        while self._unanswered >= self._most_unanswered:
            self._raise_if_over()
            await self.news()
        self._raise_if_over()
        self._last_input_s = self._clock.now()
        self.journal.heard(self.journal.heard_frames, pcm)  # before it enters the trunk: there it may be lost
        self.residence.feed()

    async def frames(self) -> AsyncIterator[FrameOut]:
        """The agent's frames in order; one whose pcm is empty lost its audio to a slow reader, or is too old to be
        heard after a recovery. Its text is there all the same.

        Ends when the conversation is ended here. When it fails, what had come is still given, then it raises;
        a client at fault is told at once.
        """
        while True:
            if isinstance(self._failure, ClientFault):
                raise self._failure
            frame = self._queue.take()
            if frame is not None:
                yield frame
            elif self._failure is not None:
                raise self._failure
            elif self._over.is_set():
                return
            else:
                await self.news()

    async def watch(self) -> None:
        """Return when the conversation ends, raise when it fails, even while everything else is stuck."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    # What the hub does

    def start(self, home: Home) -> None:
        """Begin in this slot."""
        self._trace.start("prefill")
        self.residence.begin(home)

    def go_on(self, adopted: Adopted, missed: Missed) -> None:
        """Go on in a slot that was another ingress's, or this one's, until its client was lost."""
        end = self.journal.next_frame
        self.first_frame = missed.first_frame(self.journal)
        self._queue = self._new_queue()
        self._replay = Replay(self.first_frame, end)
        self._unheard = 0 if missed.replay else end
        self.residence.take_over(adopted.home, self.first_frame, adopted.messages)

    def fail(self, error: ServingError) -> None:
        """End the conversation against its user's wish; only the first reason counts."""
        if not self._over.is_set():
            self._failure = error
            self.end()

    def end(self) -> None:
        """The handler is done, or will be told so: wake whoever still waits, look for no home any more."""
        self._over.set()
        self.residence.end()
        self.wake()

    def park(self) -> None:
        """The client was lost. If it holds a resume token, its slot waits for it."""
        self._parked = self.holding.resumable and not self._over.is_set()

    @property
    def parked(self) -> bool:
        return self._parked

    def desert(self) -> None:
        """When this ingress lets go of it, let the slot wait at its replica for a client that holds a token."""
        self._deserted = self.holding.resumable and self.residence.home is not None

    async def over_within(self, seconds: float) -> None:
        """Wait until the conversation is over, at most so long."""
        try:
            await self._clock.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return

    def leave(self) -> None:
        """End, and let go of the slot at the replica."""
        self.end()
        self.residence.leave(desert=self._deserted)

    async def give_back(self) -> None:
        """After `leave`: give the router what is its own, unless somebody is to take it over."""
        await self.residence.left()
        if not self._deserted:
            await self.holding.give_back(opened=True)

    async def expire_when_idle(self) -> None:
        """Fail the conversation once its client has been silent for `idle_timeout_s`."""
        timeout_s = self._settings.idle_timeout_s
        while not self._over.is_set():
            left_s = self._last_input_s + timeout_s - self._clock.now()
            if left_s <= 0:
                self.fail(IdleClient(f"No audio came for {timeout_s:g} s."))
                return
            try:
                await self._clock.wait_for(self._over.wait(), left_s)
            except TimeoutError:
                continue  # look again: audio may have come meanwhile

    # What its residence says

    def begun(self, ready: Ready) -> None:
        if self._ready is None:
            # Credit has run since the call was opened: what was said meanwhile is heard at once. A client that waits
            # for the prompt with its audio queued (LiveKit's plugin) would stay that late for good.
            self._ready = ready
            self._last_input_s = self._clock.now()
            self._trace.start("live")

    def lost(self) -> None:
        self._trace.start("recovery")
        for frame in self._replay.give_up():
            self._queue.put(frame)

    def resumed(self) -> None:
        self._late.begin(self._unanswered)
        self._trace.start("live")

    def answer(self, frame: FrameOut) -> None:
        """The next frame of the agent goes into the journal and to the client; one answered again does not, unless
        the client has missed it."""
        number = frame.key.frame
        if self.journal.take(frame):  # raises JournalError when one is missing
            self._trace.frame(frame.replica_ms)
            stale = self._late.stale(self.journal.heard_frames - 1 - number)
        elif frame in self._replay:
            stale = number < self._unheard
        else:
            return
        for heard in self._replay.take(replace(frame, pcm=SILENT) if stale else frame):
            self._queue.put(heard)
        if self._queue.overrun and not self._parked:
            self.fail(SlowClient(f"The client is more than {self._settings.slow_client_s:g} s behind."))

    async def news(self) -> None:
        """Until something has happened."""
        await self._news.wait()

    def wake(self) -> None:
        """Something has come for ready(), frames(), a sender that waits for room, a relocation. A fresh event each
        time, so that no waiter can clear away what another has not seen."""
        self._news.set()
        self._news = asyncio.Event()

    # Inside

    def _new_queue(self) -> OutputQueue:
        settings = self._settings
        stale, limit = round(settings.stale_audio_s / FRAME_S), round(settings.slow_client_s / FRAME_S)
        return OutputQueue(stale, limit, self.first_frame)

    @property
    def _unanswered(self) -> int:
        return self.journal.heard_frames - self.journal.next_frame

    @property
    def _most_unanswered(self) -> int:
        """A replica that lags holds its client back; during a recovery the client is heard all the same."""
        if self.residence.settled and not self._late.catching_up:
            return MAX_IN_FLIGHT
        return MAX_IN_FLIGHT + round(self._settings.recovery_s / FRAME_S)

    async def _sleep(self, seconds: float) -> None:
        """Raises as soon as the conversation is over."""
        try:
            await self._clock.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return
        self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._over.is_set():
            raise ConversationBroken("The conversation has ended.")

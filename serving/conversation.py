"""One live conversation as its ingress sees it: numbering, pace, bounds, journal; what a protocol handler talks to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

from actors.errors import (
    BadRequest,
    ClientFault,
    ConversationBroken,
    IdleClient,
    JournalError,
    ReplicaLost,
    ServingError,
    SlowClient,
    from_code,
)
from actors.interfaces import Clock
from actors.journal import Journal
from actors.messages import Down, DownSink, Failed, FrameIn, FrameOut, Need, Ready, Up
from graphs.stages import FrameKey, Pcm, SessionSpec
from serving.output_queue import OutputQueue
from serving.router import Grant
from serving.settings import FRAME_S, ServeSettings
from serving.telemetry import ConversationTrace

log = logging.getLogger(__name__)

# A replica takes 2 s of a conversation in flight and refuses more; staying below, we never meet that refusal.
MAX_IN_FLIGHT = 24


class TrunkPort(Protocol):
    """A live trunk to one replica."""

    def attach(self, session: str, epoch: int, sink: DownSink) -> None: ...

    def detach(self, session: str, epoch: int) -> None: ...

    async def send(self, message: Up) -> None: ...

    def send_nowait(self, message: Up) -> None: ...


class Conversation:
    """One live conversation. One task sends, one reads frames; any may watch."""

    def __init__(
        self,
        grant: Grant,
        spec: SessionSpec,
        trunk: TrunkPort,
        settings: ServeSettings,
        trace: ConversationTrace,
        clock: Clock,
    ) -> None:
        self.session = grant.session
        self.epoch = grant.epoch
        self.spec = spec
        self.journal = Journal(grant.session, spec)
        self.left = asyncio.Event()  # set by the hub: the handler is gone and the slot given back
        self._numerics_id = grant.numerics_id
        self._trunk = trunk
        self._settings = settings
        self._trace = trace
        self._clock = clock
        self._ready: Ready | None = None
        self._failure: ServingError | None = None
        self._over = asyncio.Event()  # ended or failed
        self._news = asyncio.Event()  # set once, then replaced: see _wake
        self._queue = OutputQueue(
            round(settings.stale_audio_s / FRAME_S),
            round(settings.slow_client_s / FRAME_S),
        )
        self._sent = 0  # frames of the user that went to the replica
        self._answered = 0  # frames of the agent that came back
        self._credit = float(settings.ahead_frames)  # frames that may be sent now
        self._credit_at_s = self._last_input_s = clock.now()
        trace.start("prefill")

    @property
    def frames_sent(self) -> int:
        return self._sent

    @property
    def frames_answered(self) -> int:
        return self._answered

    @property
    def audio_frames_dropped(self) -> int:
        """80 ms frames whose audio the client was too slow for."""
        return self._queue.dropped_frames

    async def ready(self) -> Ready:
        """Wait until the prompt is in the KV cache. Raises what the replica says against it."""
        deadline_s = self._clock.now() + self._settings.ready_timeout_s
        while self._ready is None:
            self._raise_if_over()
            try:
                await self._clock.wait_for(self._news.wait(), deadline_s - self._clock.now())
            except TimeoutError:
                self.fail(ConversationBroken(f"The prompt took longer than {self._settings.ready_timeout_s:g} s."))
        return self._ready

    async def send(self, pcm: Pcm) -> None:
        """Hand over 80 ms of the user: [1920] int16, 24 kHz mono.

        Waits for the prompt, for its turn when the client is more than `ahead_frames` ahead of real time, and
        for the replica when 2 s are in flight. Nothing is dropped. Raises when the conversation is over.
        """
        if pcm.shape != (1920,) or pcm.dtype.kind != "i" or pcm.dtype.itemsize != 2:
            raise BadRequest(f"A frame is [1920] int16, not {list(pcm.shape)} {pcm.dtype}.")
        self._last_input_s = self._clock.now()
        await self.ready()
        await self._pace()
        while self._sent - self._answered >= MAX_IN_FLIGHT:
            self._raise_if_over()
            await self._news.wait()
        self._raise_if_over()
        frame = self._sent
        self._sent += 1
        self._last_input_s = self._clock.now()
        self.journal.heard(frame, pcm)  # before it enters the trunk: what is lost on the way can be sent again
        await self._trunk.send(FrameIn(FrameKey(self.session, self.epoch, frame), pcm))

    async def frames(self) -> AsyncIterator[FrameOut]:
        """The agent's frames in order; one whose pcm is empty lost its audio to a slow reader, not its text.

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
                await self._news.wait()

    async def watch(self) -> None:
        """Return when the conversation ends, raise when it fails, even while everything else is stuck."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    # Called by the hub

    def deliver(self, message: Down) -> None:
        """Take one message off the trunk. Never blocks."""
        if self._over.is_set():
            return
        if isinstance(message, FrameOut):
            self._take_frame(message)
        elif isinstance(message, Ready):
            if self._ready is None:
                self._ready = message
                self._last_input_s = self._clock.now()
                # Credit has run since the call was opened: what was said meanwhile is heard at once. A client that
                # waits for the prompt with its audio queued (LiveKit's plugin) would stay that late for good.
                self.journal.begin(message.prompt_hash, message.prompt_frames, self._numerics_id)
                self._trace.start("live")
        elif isinstance(message, Failed):
            self.fail(from_code(message.code, message.message))
        elif isinstance(message, Need):
            self._repeat_from(message.need_frame)
        self._wake()

    def fail(self, error: ServingError) -> None:
        """End the conversation against its user's wish; only the first reason counts."""
        if not self._over.is_set():
            self._failure = error
            self.end()

    def end(self) -> None:
        """The handler is done: wake whoever still waits."""
        self._over.set()
        self._wake()

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

    # Inside

    def _take_frame(self, frame: FrameOut) -> None:
        if frame.key.frame < self._answered:
            return  # answered again after a retry
        try:
            self.journal.take(frame)
        except JournalError as error:
            self.fail(ConversationBroken("A frame of the agent is missing."))
            log.error("session %s: %s", self.session, error)
            return
        self._answered += 1
        self._trace.frame(frame.replica_ms)
        self._queue.put(frame)
        if self._queue.overrun:
            self.fail(SlowClient(f"The client is more than {self._settings.slow_client_s:g} s behind."))

    def _repeat_from(self, frame: int) -> None:
        """The replica misses frames: the journal has them, as long as they are within the codec's window."""
        kept = self.journal.pcm
        if not kept.start <= frame < kept.next:
            self.fail(ConversationBroken(f"Frame {frame} is needed again and not kept any more."))
            return
        try:
            for number, pcm in enumerate(kept.array()[frame - kept.start :], start=frame):
                self._trunk.send_nowait(FrameIn(FrameKey(self.session, self.epoch, number), pcm))
        except ReplicaLost as error:
            self.fail(error)

    async def _pace(self) -> None:
        """A client in real time never waits here; a faster one gets `ahead_frames` and then waits for the clock.

        One that paused may catch up by as many frames as may be in flight, so that a network's hiccup does not
        leave it late for good.
        """
        while True:
            now_s = self._clock.now()
            self._credit = min(float(MAX_IN_FLIGHT), self._credit + (now_s - self._credit_at_s) / FRAME_S)
            self._credit_at_s = now_s
            if self._credit >= 1.0:
                self._credit -= 1.0
                return
            try:
                await self._clock.wait_for(self._over.wait(), (1.0 - self._credit) * FRAME_S)
            except TimeoutError:
                continue
            self._raise_if_over()

    def _wake(self) -> None:
        """Something has come for ready(), frames() or a sender that waits for room. A fresh event each time, so
        that no waiter can clear away what another has not seen."""
        self._news.set()
        self._news = asyncio.Event()

    def _raise_if_over(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._over.is_set():
            raise ConversationBroken("The conversation has ended.")

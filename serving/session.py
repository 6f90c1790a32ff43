"""What a protocol handler drives: a conversation, neutral to wire protocols and to where it is computed.

    async with hub.open(spec, tenant, client) as conversation:
        await conversation.ready()
        await conversation.send(pcm)                  # paced; waits rather than drops
        async for frame in conversation.frames(): …   # in order, no gap, no double
        await conversation.watch()                    # raises as soon as the conversation fails: race it

However the block is left, the slot is given back. Everything a conversation can raise is a ServingError.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from actors.errors import (
    BadRequest,
    ClientFault,
    ConversationBroken,
    Draining,
    IdleClient,
    JournalError,
    ReplicaLost,
    RoleTooLong,
    ServingError,
    SlowClient,
    UnknownVoice,
    from_code,
)
from actors.interfaces import Clock, MonotonicClock
from actors.journal import Journal
from actors.messages import CloseRequest, Down, DownSink, Failed, FrameIn, FrameOut, Need, OpenRequest, Ready, Up
from graphs.stages import FrameKey, Pcm, SessionSpec
from serving.output_queue import OutputQueue
from serving.router import AcquireRequest, Grant
from serving.settings import FRAME_S, ServeSettings
from serving.telemetry import ConversationTrace, Telemetry
from serving.tenants import Tenant

log = logging.getLogger(__name__)

# A replica takes 2 s of a conversation in flight and refuses more; staying below, we never meet that refusal.
MAX_IN_FLIGHT = 24


class RouterPort(Protocol):
    """The session router, wherever it runs. Only `acquire` raises."""

    async def acquire(self, request: AcquireRequest) -> Grant: ...

    async def release(self, session: str, epoch: int, *, opened: bool) -> None: ...

    async def abandon(self, session: str) -> None: ...


class TrunkPort(Protocol):
    """A live trunk to one replica."""

    def attach(self, session: str, epoch: int, sink: DownSink) -> None: ...

    def detach(self, session: str, epoch: int) -> None: ...

    async def send(self, message: Up) -> None: ...

    def send_nowait(self, message: Up) -> None: ...


class TrunkSource(Protocol):
    async def get(self, address: str) -> TrunkPort: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Which ingress this is, and on which node."""

    ingress: str
    node: str


class ConversationHub:
    """All conversations of one ingress process."""

    def __init__(
        self,
        router: RouterPort,
        trunks: TrunkSource,
        place: Place,
        settings: ServeSettings,
        *,
        telemetry: Telemetry | None = None,
        has_voice: Callable[[str], bool] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._router = router
        self._trunks = trunks
        self._place = place
        self._settings = settings
        self._telemetry = telemetry or Telemetry.off()
        self._has_voice = has_voice
        self._clock: Clock = clock or MonotonicClock()
        self._cleanups: set[asyncio.Task[None]] = set()
        self._conversations: set[Conversation] = set()

    @asynccontextmanager
    async def open(self, spec: SessionSpec, tenant: Tenant, client: str) -> AsyncIterator[Conversation]:
        """Take a slot, ask its replica for the conversation, give both back at the end.

        Raises UnknownVoice and RoleTooLong before a slot is taken, TenantLimit, NoCapacity, ReplicaLost. What
        goes wrong later is raised by the conversation. `client` names the caller in the trace.
        """
        self._check(spec)
        session = uuid4().hex
        trace = self._telemetry.conversation(session, tenant.name, client, spec)
        try:
            grant = await self._acquire(session, tenant, trace)
            async with self._held(grant, spec, tenant, trace) as conversation:
                yield conversation
        except BaseException as error:
            trace.failed(error)
            raise
        finally:
            trace.end()

    @property
    def live(self) -> int:
        """Conversations that hold a slot now."""
        return len(self._conversations)

    async def hang_up(self, reason: str) -> None:
        """Fail every conversation with Draining, whose close code tells clients to come back; wait for them to go."""
        conversations = list(self._conversations)
        for conversation in conversations:
            conversation.fail(Draining(reason))
        await asyncio.gather(*(conversation.left.wait() for conversation in conversations))
        await self.close()

    async def close(self) -> None:
        """Wait until everything that was given back has arrived."""
        while self._cleanups:
            await asyncio.gather(*self._cleanups, return_exceptions=True)

    def _check(self, spec: SessionSpec) -> None:
        limit = self._settings.role_max_chars
        if len(spec.role) > limit:
            raise RoleTooLong(f"A role has at most {limit} characters; this one has {len(spec.role)}.")
        try:
            spec.role.encode()
        except UnicodeEncodeError:
            raise BadRequest("The role is not valid Unicode text.") from None
        if self._has_voice is not None and not self._has_voice(spec.voice):
            raise UnknownVoice("There is no voice of this name.")

    async def _acquire(self, session: str, tenant: Tenant, trace: ConversationTrace) -> Grant:
        request = AcquireRequest(
            session,
            tenant.name,
            tenant.max_conversations,
            self._place.ingress,
            self._place.node,
            self._settings.admission_wait_s,
        )
        with trace.span("admission"):
            try:
                return await self._router.acquire(request)
            except asyncio.CancelledError:
                # The caller is gone, and a grant may be on its way: let the router forget it.
                self._later(self._router.abandon(session))
                raise

    @asynccontextmanager
    async def _held(
        self, grant: Grant, spec: SessionSpec, tenant: Tenant, trace: ConversationTrace
    ) -> AsyncIterator[Conversation]:
        """The slot is ours: from here on every way out gives it back. No await between the grant and `try`."""
        trunk: TrunkPort | None = None
        conversation: Conversation | None = None
        watchdog: asyncio.Task[None] | None = None
        try:
            trunk = await self._trunks.get(grant.address)
            conversation = Conversation(grant, spec, trunk, self._settings, trace, self._clock)
            self._conversations.add(conversation)
            trunk.attach(grant.session, grant.epoch, conversation.deliver)
            trunk.send_nowait(OpenRequest(grant.session, grant.epoch, tenant.name, self._place.ingress, spec))
            watchdog = asyncio.create_task(conversation.expire_when_idle())
            yield conversation
        finally:
            if conversation is not None:
                conversation.end()
                self._conversations.discard(conversation)
                conversation.left.set()
            if watchdog is not None:
                watchdog.cancel()
            if trunk is not None:
                trunk.detach(grant.session, grant.epoch)
                try:
                    trunk.send_nowait(CloseRequest(grant.session, grant.epoch, "the conversation ended"))
                except ReplicaLost:
                    log.info("session %s ended with its replica", grant.session)
            # A task of its own: this code may be running because of a cancellation, and another may come.
            self._later(self._router.release(grant.session, grant.epoch, opened=watchdog is not None))

    def _later(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)


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

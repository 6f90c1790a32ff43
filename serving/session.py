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

from actors.errors import BadRequest, Draining, ReplicaLost, RoleTooLong, UnknownVoice
from actors.interfaces import Clock, MonotonicClock
from actors.messages import CloseRequest, OpenRequest
from graphs.stages import SessionSpec
from serving.conversation import Conversation, TrunkPort
from serving.router import AcquireRequest, Grant
from serving.settings import ServeSettings
from serving.telemetry import ConversationTrace, Telemetry
from serving.tenants import Tenant

__all__ = ["Conversation", "ConversationHub", "Place", "RouterPort", "TrunkPort", "TrunkSource"]

log = logging.getLogger(__name__)

MOST_REPLICAS_TRIED = 3


class RouterPort(Protocol):
    """The session router, wherever it runs. Only `acquire` raises."""

    async def acquire(self, request: AcquireRequest) -> Grant: ...

    async def release(self, session: str, epoch: int, *, opened: bool) -> None: ...

    async def abandon(self, session: str) -> None: ...


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
            grant, trunk = await self._find_place(session, tenant, trace)
            async with self._held(grant, trunk, spec, tenant, trace) as conversation:
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

    async def _find_place(self, session: str, tenant: Tenant, trace: ConversationTrace) -> tuple[Grant, TrunkPort]:
        """A slot, and the trunk to its replica. One that has just died may still be granted until its lease is over:
        then another is asked for."""
        avoid: tuple[str, ...] = ()
        epoch = 0
        with trace.span("admission"):
            while True:
                grant = await self._acquire(session, tenant, avoid, epoch)
                try:
                    return grant, await self._trunks.get(grant.address)
                except ReplicaLost:
                    returned = self._later(self._router.release(session, grant.epoch, opened=False))
                    avoid, epoch = (*avoid, grant.replica), grant.epoch
                    if len(avoid) == MOST_REPLICAS_TRIED:
                        raise
                    await asyncio.shield(returned)
                except BaseException:
                    self._later(self._router.release(session, grant.epoch, opened=False))
                    raise

    async def _acquire(self, session: str, tenant: Tenant, avoid: tuple[str, ...], epoch: int) -> Grant:
        request = AcquireRequest(
            session,
            tenant.name,
            tenant.max_conversations,
            self._place.ingress,
            self._place.node,
            self._settings.admission_wait_s,
            epoch,
            avoid,
        )
        try:
            return await self._router.acquire(request)
        except asyncio.CancelledError:
            # The caller is gone, and a grant may be on its way: let the router forget it.
            self._later(self._router.abandon(session))
            raise

    @asynccontextmanager
    async def _held(
        self, grant: Grant, trunk: TrunkPort, spec: SessionSpec, tenant: Tenant, trace: ConversationTrace
    ) -> AsyncIterator[Conversation]:
        """The slot is ours: from here on every way out gives it back. No await between the grant and `try`."""
        conversation = Conversation(grant, spec, trunk, self._settings, trace, self._clock)
        self._conversations.add(conversation)
        watchdog: asyncio.Task[None] | None = None
        try:
            trunk.attach(grant.session, grant.epoch, conversation.deliver)
            trunk.send_nowait(OpenRequest(grant.session, grant.epoch, tenant.name, self._place.ingress, spec))
            watchdog = asyncio.create_task(conversation.expire_when_idle())
            yield conversation
        finally:
            conversation.end()
            self._conversations.discard(conversation)
            conversation.left.set()
            if watchdog is not None:
                watchdog.cancel()
            trunk.detach(grant.session, grant.epoch)
            try:
                trunk.send_nowait(CloseRequest(grant.session, grant.epoch, "the conversation ended"))
            except ReplicaLost:
                log.info("session %s ended with its replica", grant.session)
            # A task of its own: this code may be running because of a cancellation, and another may come.
            self._later(self._router.release(grant.session, grant.epoch, opened=watchdog is not None))

    def _later(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
        return task

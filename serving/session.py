"""What a protocol handler drives: a conversation, neutral to wire protocols and to where it is computed.

    async with hub.open(spec, tenant, client) as conversation:
        await conversation.ready()
        await conversation.send(pcm)                  # paced; waits rather than drops
        async for frame in conversation.frames(): …   # in order, no gap, no double
        await conversation.watch()                    # raises as soon as the conversation fails: race it

However the block is left, the slot is given back; or, where the client holds a resume token and was lost
(`conversation.park`), it waits for `resume_grace_s`. Everything a conversation can raise is a ServingError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from uuid import uuid4

from actors.errors import BadRequest, Draining, ReplicaLost, RoleTooLong, UnknownVoice
from actors.interfaces import Clock, MonotonicClock
from actors.journal import RECEPTIVE_S, Journal
from graphs.stages import SessionSpec
from serving.apart import Elsewhere
from serving.conversation import Conversation
from serving.holding import Holding, Place
from serving.home import Home
from serving.relocation import TrunkSource
from serving.resume import Missed, Ticket, adopt
from serving.routing import RouterPort
from serving.settings import ServeSettings
from serving.telemetry import ConversationTrace, Telemetry
from serving.tenants import Tenant

__all__ = ["Conversation", "ConversationHub", "Place"]  # all that a protocol handler needs

MOST_REPLICAS_TRIED = 3


class ConversationHub:
    """All conversations of one ingress process. `codec_s`: how far back the codec's state depends on what it heard."""

    def __init__(
        self,
        router: RouterPort,
        trunks: TrunkSource,
        place: Place,
        settings: ServeSettings,
        *,
        telemetry: Telemetry | None = None,
        has_voice: Callable[[str], bool] | None = None,
        codec_s: float = RECEPTIVE_S,
        clock: Clock | None = None,
    ) -> None:
        self._router = router
        self._trunks = trunks
        self._place = place
        self._settings = settings
        self._telemetry = telemetry or Telemetry.off()
        self._has_voice = has_voice
        self._codec_s = codec_s
        self._clock: Clock = clock or MonotonicClock()
        self._elsewhere = Elsewhere(router, place, self._clock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._conversations: set[Conversation] = set()
        self._parked: set[Conversation] = set()

    @asynccontextmanager
    async def open(
        self, spec: SessionSpec, tenant: Tenant, client: str, *, resumable: bool = False
    ) -> AsyncIterator[Conversation]:
        """Take a slot, ask its replica for the conversation, give both back at the end.

        Raises UnknownVoice and RoleTooLong before a slot is taken, TenantLimit, NoCapacity, ReplicaLost. What
        goes wrong later is raised by the conversation. `client` names the caller in the trace.
        """
        self._check(spec)
        session = uuid4().hex
        trace = self._telemetry.conversation(session, tenant.name, client, spec)
        async with _traced(trace):
            holding = self._holding(session, tenant, resumable)
            with trace.span("admission"):
                home = await self._first_home(holding)
            conversation = self._conversation(Journal(session, spec, self._journal_s), holding, trace)
            async with self._held(conversation):
                conversation.start(home)
                yield conversation

    @asynccontextmanager
    async def resume(self, ticket: Ticket, tenant: Tenant, client: str, missed: Missed) -> AsyncIterator[Conversation]:
        """A live conversation whose client came back, wherever it was held until now.

        Raises UnknownSession when the ticket opens nothing (any more), NoCapacity, ReplicaLost.
        """
        holding = self._holding(ticket.session, tenant, resumable=True)
        adopted = await adopt(holding, ticket, self._trunks, self._clock, self._journal_s)
        trace = self._telemetry.conversation(ticket.session, tenant.name, client, adopted.journal.spec)
        async with _traced(trace):
            conversation = self._conversation(adopted.journal, holding, trace)
            async with self._held(conversation):
                conversation.go_on(adopted, missed)
                yield conversation

    @property
    def place(self) -> Place:
        """Which ingress this is, and where."""
        return self._place

    @property
    def live(self) -> int:
        """Conversations that hold a slot now."""
        return len(self._conversations)

    @property
    def conversations(self) -> Iterable[Conversation]:
        """Those that hold a slot, parked ones included."""
        return tuple(self._conversations)

    def find(self, session: str) -> Conversation | None:
        """The conversation of this name, if it is alive here."""
        return next((each for each in self._conversations if each.session == session and not each.over), None)

    async def hang_up(self, reason: str) -> None:
        """The system stops: fail every conversation with Draining, whose close code tells clients to come back, and
        wait until they have gone. Nobody is waited for, whatever token he holds."""
        conversations = list(self._conversations)
        for conversation in conversations:
            conversation.fail(Draining(reason))
        await asyncio.gather(*(conversation.left.wait() for conversation in conversations))
        await self.close()

    async def close(self) -> None:
        """This ingress leaves a system that stays: wait until everything that was given back has arrived. The slots of
        clients that were lost wait for them at their replicas."""
        for conversation in self._parked:
            conversation.desert()
            conversation.end()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

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

    @property
    def _journal_s(self) -> float:
        """What a journal keeps: what a codec's state depends on, and what is heard during a recovery."""
        return self._codec_s + self._settings.recovery_s

    def _conversation(self, journal: Journal, holding: Holding, trace: ConversationTrace) -> Conversation:
        return Conversation(
            journal,
            holding,
            self._trunks,
            self._settings,
            trace,
            self._clock,
            self._elsewhere,
            codec_s=self._codec_s,
        )

    def _holding(self, session: str, tenant: Tenant, resumable: bool) -> Holding:
        return Holding(self._router, self._place, tenant, session, self._later, self._clock, resumable)

    async def _first_home(self, holding: Holding) -> Home:
        """A slot, and the trunk to its replica. One that has just died may still be granted until its lease is over:
        then another is asked for."""
        avoid: tuple[str, ...] = ()
        while True:
            grant = await holding.acquire(self._settings.admission_wait_s, avoid)
            try:
                return Home(grant, await self._trunks.get(grant.address))
            except ReplicaLost:
                avoid = (*avoid, grant.replica)
                await asyncio.shield(self._later(holding.give_back(opened=False)))
                if len(avoid) == MOST_REPLICAS_TRIED:
                    raise
            except BaseException:
                self._later(holding.give_back(opened=False))
                raise

    @asynccontextmanager
    async def _held(self, conversation: Conversation) -> AsyncIterator[None]:
        """The slot is ours: from here on every way out gives it back. No await between the grant and `try`."""
        self._conversations.add(conversation)
        watchdog = asyncio.create_task(conversation.expire_when_idle())
        try:
            yield
        finally:
            watchdog.cancel()
            if conversation.parked:
                self._parked.add(conversation)
                self._later(self._keep(conversation))
            else:
                self._end(conversation)

    async def _keep(self, conversation: Conversation) -> None:
        """Hold the slot of a client that was lost until it is taken over, or the grace is over."""
        try:
            await conversation.over_within(self._settings.resume_grace_s)
        finally:
            self._parked.discard(conversation)
            self._end(conversation)

    def _end(self, conversation: Conversation) -> None:
        # The rest is a task of its own: this code may be running because of a cancellation, and another may come.
        conversation.leave()
        self._conversations.discard(conversation)
        conversation.left.set()
        self._later(conversation.give_back())

    def _later(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@asynccontextmanager
async def _traced(trace: ConversationTrace) -> AsyncIterator[None]:
    try:
        yield
    except BaseException as error:
        trace.failed(error)
        raise
    finally:
        trace.end()

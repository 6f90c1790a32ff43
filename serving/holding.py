"""What one conversation holds at the session router: a slot, and during a move a second one. Neither is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from uuid import uuid4

from actors.interfaces import Clock
from actors.messages import OpenRequest
from graphs.stages import SessionSpec
from serving.home import Home
from serving.routing import AcquireRequest, Grant, ResumeRequest, RouterPort
from serving.tenants import Tenant

Later = Callable[[Coroutine[None, None, None]], asyncio.Task[None]]

COMMIT_AGAIN_S = 0.2  # a killed router is back after a second or two


@dataclass(frozen=True, slots=True)
class Place:
    """Which ingress this is, and on which node."""

    ingress: str
    node: str


class Holding:
    """Asks in the conversation's name and keeps count of what it was given.

    Every call may be cancelled: what was granted on the way is forgotten at the router by a task of its own
    (`later`), and the next call waits for that task, so that it cannot undo what came after it.
    """

    def __init__(
        self,
        router: RouterPort,
        place: Place,
        tenant: Tenant,
        session: str,
        later: Later,
        clock: Clock,
        resumable: bool,
    ) -> None:
        self.session = session
        self.tenant = tenant
        self.resumable = resumable
        self.serial = 0
        self.epoch = 0  # the one in force, as far as we know
        self._highest = 0  # ever granted to us, prepared slots included
        self._prepared: int | None = None
        self._undoing: asyncio.Task[None] | None = None
        self._router = router
        self._place = place
        self._later = later
        self._clock = clock

    @property
    def prepared(self) -> bool:
        """Whether a second slot is held."""
        return self._prepared is not None

    def is_near(self, home: Home) -> bool:
        """Whether its slot is on our own node: one machine's death would take it and the journal here."""
        return home.grant.node != "" and home.grant.node == self._place.node

    def request(self, epoch: int, spec: SessionSpec, *, journal_bytes: int = 0, adopt: bool = False) -> OpenRequest:
        """What its replica is asked."""
        return OpenRequest(
            session=self.session,
            epoch=epoch,
            tenant=self.tenant.name,
            ingress=self._place.ingress,
            spec=spec,
            resumable=self.resumable,
            serial=self.serial,
            journal_bytes=journal_bytes,
            adopt=adopt,
        )

    async def acquire(
        self,
        wait_s: float,
        avoid: tuple[str, ...] = (),
        *,
        recovery: bool = False,
        deaths: int = 0,
        unreachable: bool = False,
    ) -> Grant:
        """A slot in place of the one there may be. Raises what RouterPort.acquire raises."""
        await self._undone()
        request = replace(self._ask(wait_s, avoid), recovery=recovery, deaths=deaths, unreachable=unreachable)
        try:
            grant = await self._router.acquire(request)
        except asyncio.CancelledError:
            self._forget()
            raise
        self.epoch = self._highest = grant.epoch
        self._prepared = None
        return grant

    async def prepare(self, wait_s: float, avoid: tuple[str, ...] = (), *, apart: bool = False) -> Grant:
        """A second slot, on another replica; with `apart` on another node than ours. Raises what RouterPort.prepare
        raises."""
        await self._undone()
        request = self._ask(wait_s, avoid)
        try:
            grant = await self._router.prepare(replace(request, apart=apart))
        except asyncio.CancelledError:
            self._forget()
            raise
        self._prepared = self._highest = grant.epoch
        return grant

    async def commit(self) -> None:
        """The second slot is the conversation's from now on, the first is over. Insists while the router is away.

        Raises StaleEpoch: the conversation has changed hands, or the second slot has run out.
        """
        if self._prepared is None:
            return
        while True:
            try:
                await self._router.commit(self.session, self._prepared)
            except ConnectionError:
                await pause(self._clock, COMMIT_AGAIN_S)
            else:
                self.epoch, self._prepared = self._prepared, None
                return

    def undo(self, *, opened: bool) -> None:
        """Give the second slot back; without one do nothing. `opened`: its replica was asked for it."""
        if self._prepared is not None:
            self._undoing = self._later(self._router.release(self.session, self._prepared, opened=opened))
            self._prepared = None

    async def resume(self, serial: int) -> Grant:
        """Take the live slot of this session over. Raises what RouterPort.resume raises.

        When it is cancelled nothing is undone: the slot goes on waiting, and its router lets the serial be used again
        if its replica has not heard of the new owner within a lease.
        """
        request = ResumeRequest(
            self.session, serial, self.tenant.name, self._place.ingress, self._place.node, attempt=uuid4().hex
        )
        grant = await self._router.resume(request)
        self.epoch = self._highest = grant.epoch
        self.serial = grant.serial
        return grant

    def unspend(self) -> None:
        """The token that opened this conversation is good again: its client may not have the next one."""
        self._later(self._router.unspend(self.session, self.epoch))

    async def give_back(self, *, opened: bool) -> None:
        """The end: the slot goes back, and a second one with it. `opened` False: its replica was never asked."""
        self._prepared = None
        await self._undone()
        await self._router.release(self.session, self.epoch, opened=opened)

    def drop(self, home: Home) -> None:
        """Give back a slot that is of no use after all; for where one cannot wait."""
        home.leave("it could not be taken over")
        self._later(self.give_back(opened=True))

    def keep(self, home: Home, seconds: float) -> None:
        """Let a slot that was not taken over in time wait a while longer for its client, who may try again."""
        self.unspend()
        self._later(self._keep(home, seconds))

    async def _keep(self, home: Home, seconds: float) -> None:
        try:
            await pause(self._clock, seconds)
        finally:
            home.leave("nobody came back for it")  # whoever did has a higher epoch, and does not notice
            await self.give_back(opened=True)

    def _ask(self, wait_s: float, avoid: tuple[str, ...]) -> AcquireRequest:
        return AcquireRequest(
            session=self.session,
            tenant=self.tenant.name,
            tenant_limit=self.tenant.max_conversations,
            ingress=self._place.ingress,
            ingress_node=self._place.node,
            wait_s=wait_s,
            # Not the one in force: a new router knows of no prepared slot that came to nothing but from us.
            after_epoch=self._highest,
            avoid=avoid,
            resumable=self.resumable,
            serial=self.serial,
        )

    def _forget(self) -> None:
        """What was just asked for is not wanted any more, granted or not."""
        self._undoing = self._later(self._router.abandon(self.session, self._highest))

    async def _undone(self) -> None:
        if self._undoing is not None:
            await asyncio.shield(self._undoing)
            self._undoing = None


async def pause(clock: Clock, seconds: float) -> None:
    """Sleep by this clock."""
    try:
        await clock.wait_for(asyncio.Event().wait(), seconds)
    except TimeoutError:
        return

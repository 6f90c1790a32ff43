"""The session router: who gets a slot, where, and for how long. Plain asyncio; its Ray shell is router_actor.py.

It holds no truth of its own but the epochs: replicas report their slot tables, and after its death a new router
is rebuilt from those reports. All decisions are those of cluster.policy; whoever has to wait does so at the desk
(serving.slot_desk), and this class keeps the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from actors.errors import NoCapacity, Quarantined, StaleEpoch, UnknownSession
from actors.messages import ReplicaReport
from cluster.policy.leases import EpochConflict, Lease, LeaseTable, NotHeld, Reported
from cluster.policy.quarantine import Standing, standing
from serving.fleet import Fleet
from serving.routing import (
    AcquireRequest,
    Grant,
    ReplicaView,
    ReportReply,
    ResumeRequest,
    RouterConfig,
    RouterStatus,
)
from serving.slot_desk import SlotDesk
from serving.waiting import Purpose

# Less than clients wait for an answer: whoever is told to try again has not gone yet.
ARRIVED_WITHIN_S = 2.0


class SessionRouter:
    """Grants slots, renews leases from reports, reconciles what replicas hold with what was granted."""

    def __init__(
        self,
        config: RouterConfig,
        clock: Callable[[], float] = time.monotonic,
        incarnation: str = "router",
        *,
        epochs_before: int = 0,
    ) -> None:
        """`epochs_before`: higher than any epoch that a former router can have given."""
        self.config = config
        self.incarnation = incarnation
        self._clock = clock
        self._settled_at_s = clock() + config.settle_s
        self._leases = LeaseTable(config.lease_s, config.move_s, epochs_before=epochs_before)
        self._fleet = Fleet(self._leases, config)
        self._desk = SlotDesk(config, self._leases, self._fleet, clock, self._settled_at_s)
        self._news = asyncio.Event()  # set, and replaced, when a replica has reported

    # ---- what an ingress asks for -----------------------------------------------------------------------------

    async def acquire(self, request: AcquireRequest) -> Grant:
        """A slot for this session, at once or within `wait_s`.

        Raises TenantLimit, NoCapacity, Quarantined, or StaleEpoch when the session has changed hands meanwhile. Asking
        again after a lost answer gives the same grant. Cancelling it leaves nothing behind; a caller that dies without
        cancelling leaves a lease that runs out by itself.
        """
        purpose = Purpose.RECOVERY if request.recovery else Purpose.CALL
        if request.recovery:
            await self._settled(request.session, request.after_epoch)
            if standing(request.deaths) is Standing.CONDEMNED:
                raise Quarantined("This conversation stopped the engine twice.")
        return await self._desk.ask(request, purpose)

    async def prepare(self, request: AcquireRequest) -> Grant:
        """A second slot, on another replica than the present one, for a conversation that moves; see `commit`.

        Raises NoCapacity, StaleEpoch, or UnknownSession when no replica reports that conversation.
        """
        await self._settled(request.session, request.after_epoch)
        if self._leases.get(request.session) is None:
            raise UnknownSession("There is no such conversation to move.")
        return await self._desk.ask(request, Purpose.MOVE)

    async def commit(self, session: str, epoch: int, ingress: str) -> None:
        """The prepared slot is the conversation's home; the former one is free when its replica says so.

        Raises StaleEpoch when the conversation has changed hands, UnknownSession when the prepared slot has run out:
        then the present home, if it lives, stays in force.
        """
        await self._settled(session, epoch)
        try:
            self._leases.commit(session, epoch, ingress, self._clock())
        except EpochConflict as error:
            raise StaleEpoch(str(error)) from error
        except NotHeld as error:
            raise UnknownSession(str(error), "Stay at the present home.") from error
        self._desk.serve()

    async def resume(self, request: ResumeRequest) -> Grant:
        """The same slot under the next epoch and serial, for the ingress that its client came back to.

        While its owner is taking the conversation elsewhere, it is waited for: until then the journal is nowhere else.
        Raises UnknownSession, StaleEpoch when this serial has been used, NoCapacity when that takes too long.
        """
        await self._settled(request.session, 1)
        await self._arrived(request.session)
        try:
            lease = self._leases.resume(
                request.session, request.serial, request.tenant, request.ingress, self._clock(), request.attempt
            )
        except EpochConflict as error:
            raise StaleEpoch("This resume token has been used.", "Use the newest one.") from error
        except NotHeld as error:
            raise UnknownSession("There is no such conversation any more.") from error
        grant = self._fleet.grant(lease)
        if grant is None:
            raise UnknownSession("There is no such conversation any more.")
        return grant

    def unspend(self, session: str, epoch: int, ingress: str) -> None:
        """The token that this resume used is good again. Raises StaleEpoch when this ingress does not hold it."""
        try:
            self._leases.unspend(session, epoch, ingress)
        except NotHeld as error:
            raise StaleEpoch(str(error)) from error

    def release(self, session: str, epoch: int, ingress: str, *, opened: bool = True) -> None:
        """Give a slot back. Raises actors.errors.StaleEpoch when this ingress does not hold it (any more)."""
        try:
            self._leases.release(session, epoch, ingress, self._clock(), opened=opened)
        except NotHeld as error:
            raise StaleEpoch(str(error)) from error
        self._desk.serve()

    def abandon(self, session: str, ingress: str, after_epoch: int = 0) -> None:
        """Forget what an ingress asked for, naming `after_epoch`, without learning the answer: its place in the line,
        or what it was granted. By that epoch exactly: if it resumed the conversation meanwhile, it keeps that."""
        self._desk.dismiss(session, ingress, after_epoch)
        for lease in (self._leases.pending(session), self._leases.get(session)):
            asked = lease is not None and (lease.owner, lease.after_epoch) == (ingress, after_epoch)
            if lease is not None and asked and lease.epoch > after_epoch:
                self._leases.release(session, lease.epoch, ingress, self._clock(), opened=lease.confirmed)
        self._desk.serve()

    async def locate(self, session: str) -> Grant | None:
        """Where a conversation lives now."""
        await self._settled(session, 1)
        lease = self._leases.get(session)
        return None if lease is None else self._fleet.grant(lease)

    def drain(self, replica: str) -> None:
        """Have a replica emptied: it gets nobody new, and is told so with its next report. Raises UnknownReplica."""
        self._fleet.drain(replica)
        self._desk.serve()

    # ---- what replicas and the clock say ----------------------------------------------------------------------

    def report(self, report: ReplicaReport) -> ReportReply:
        """Take in a replica's heartbeat: register it, renew and reconcile its leases, serve the line."""
        now_s = self._clock()
        member = self._fleet.heard(report, now_s)
        busy = (
            Reported(slot.session, slot.epoch, slot.tenant, slot.ingress, slot.serial, slot.live)
            for slot in report.busy
        )
        close = self._leases.reconcile(report.replica, busy, now_s, adopt=now_s < member.adopt_until_s)
        self._fleet.refresh(report.replica)
        self._tell()
        self._desk.serve()
        return ReportReply(close, self._desk.waiting, self.config.lease_s, member.draining)

    def forget(self, replica: str) -> None:
        """A replica has said that it is gone for good."""
        if self._fleet.drop(replica):
            self._leases.forget(replica, self._clock())
            self._desk.serve()

    def tick(self) -> list[Lease]:
        """Expire what nobody renews; call it a few times per lease. Returns the leases that ran out."""
        now_s = self._clock()
        self._fleet.drop_silent(now_s)
        ran_out = self._leases.expire(now_s)
        self._tell()
        self._desk.serve()
        return ran_out

    def status(self) -> RouterStatus:
        """Counts for /readyz, the autoscaler and the dashboards."""
        return RouterStatus(
            replicas=len(self._fleet),
            admitting=self._fleet.admitting,
            slots=self._fleet.slots,
            busy=len(self._leases),
            waiting=self._desk.waiting,
            incarnation=self.incarnation,
        )

    def replicas(self) -> tuple[ReplicaView, ...]:
        """All replicas, by name."""
        return self._fleet.views(self._clock())

    # ---- inside -----------------------------------------------------------------------------------------------

    async def _settled(self, session: str, epoch: int) -> None:
        """Until this epoch of a session is known, or a new router has listened for long enough to know that it is
        not: whoever comes right after its start may be ahead of the replica's report."""
        while self._leases.highest(session) < epoch and self._clock() < self._settled_at_s:
            await self._news.wait()

    async def _arrived(self, session: str) -> None:
        until_s = self._clock() + ARRIVED_WITHIN_S
        while (lease := self._leases.get(session)) is not None and lease.arriving:
            if self._clock() >= until_s:
                raise NoCapacity("The conversation is being taken to another replica.", "Try again.")
            await self._news.wait()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

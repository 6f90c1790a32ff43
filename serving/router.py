"""The session router: who gets a slot, where, and for how long. Plain asyncio; its Ray shell is router_actor.py.

It holds no truth of its own but the epochs: replicas report their slot tables, and after its death a new router
is rebuilt from those reports. All decisions are those of cluster.policy; this class keeps the line and the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from actors.errors import NoCapacity, Quarantined, StaleEpoch, TenantLimit, UnknownSession
from actors.messages import ReplicaReport
from cluster.policy.admission import Admission, admit
from cluster.policy.leases import Claim, EpochConflict, Lease, LeaseTable, NotHeld, Reported
from cluster.policy.placement import Spot
from cluster.policy.quarantine import Standing, standing
from serving.fleet import Fleet, Member
from serving.routing import (
    AcquireRequest,
    Grant,
    ReplicaView,
    ReportReply,
    ResumeRequest,
    RouterConfig,
    RouterPort,
    RouterStatus,
)
from serving.waiting import Purpose, Waiter, WaitingLine

__all__ = [
    "AcquireRequest",
    "Grant",
    "ReplicaView",
    "ReportReply",
    "ResumeRequest",
    "RouterConfig",
    "RouterPort",
    "RouterStatus",
    "SessionRouter",
]

# One that a caller could not reach is tried again after this, if nobody else takes the conversation: it may be back.
AVOID_FOR_S = 2.0
# Less than clients wait for an answer: whoever is told to try again has not gone yet.
ARRIVED_WITHIN_S = 2.0


class SessionRouter:
    """Grants slots, renews leases from reports, reconciles what replicas hold with what was granted."""

    def __init__(
        self, config: RouterConfig, clock: Callable[[], float] = time.monotonic, incarnation: str = "router"
    ) -> None:
        self.config = config
        self.incarnation = incarnation
        self._clock = clock
        self._settled_at_s = clock() + config.settle_s
        self._leases = LeaseTable(config.lease_s, config.move_s)
        self._fleet = Fleet(self._leases, config)
        self._line = WaitingLine()
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
        return await self._ask(request, purpose)

    async def prepare(self, request: AcquireRequest) -> Grant:
        """A second slot, on another replica than the present one, for a conversation that moves; see `commit`.

        Raises NoCapacity, StaleEpoch, or UnknownSession when no replica reports that conversation.
        """
        await self._settled(request.session, request.after_epoch)
        if self._leases.get(request.session) is None:
            raise UnknownSession("There is no such conversation to move.")
        return await self._ask(request, Purpose.MOVE)

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
        self._serve()

    async def resume(self, request: ResumeRequest) -> Grant:
        """The same slot under the next epoch and serial, for the ingress that its client came back to.

        While its owner is taking the conversation elsewhere, it is waited for: until then the journal is nowhere else.
        Raises UnknownSession, StaleEpoch when this serial has been used, NoCapacity when that takes too long.
        """
        await self._settled(request.session, 1)
        await self._arrived(request.session)
        try:
            lease = self._leases.resume(request.session, request.serial, request.tenant, request.ingress, self._clock())
        except EpochConflict as error:
            raise StaleEpoch("This resume token has been used.", "Use the newest one.") from error
        except NotHeld as error:
            raise UnknownSession("There is no such conversation any more.") from error
        holder = self._fleet.get(lease.replica)
        if holder is None:
            raise UnknownSession("There is no such conversation any more.")
        return _grant_of(lease, holder)

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
        self._serve()

    def abandon(self, session: str, ingress: str, after_epoch: int = 0) -> None:
        """Forget what an ingress asked for without learning the answer: its place in the line, or what it was granted
        beyond `after_epoch`."""
        waiter = self._line.get(session)
        if waiter is not None and waiter.request.ingress == ingress and waiter.request.after_epoch >= after_epoch:
            self._dismiss(waiter, NoCapacity("The caller gave up."))
        for lease in (self._leases.pending(session), self._leases.get(session)):
            if lease is not None and lease.owner == ingress and lease.epoch > after_epoch:
                self._leases.release(session, lease.epoch, ingress, self._clock(), opened=lease.confirmed)
        self._serve()

    async def locate(self, session: str) -> Grant | None:
        """Where a conversation lives now."""
        await self._settled(session, 1)
        lease = self._leases.get(session)
        holder = None if lease is None else self._fleet.get(lease.replica)
        return None if lease is None or holder is None else _grant_of(lease, holder)

    def drain(self, replica: str) -> None:
        """Have a replica emptied: it gets nobody new, and is told so with its next report. Raises UnknownReplica."""
        self._fleet.drain(replica)
        self._serve()

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
        self._serve()
        waiting = self._line.callers + self._line.recoveries
        return ReportReply(close, waiting, self.config.lease_s, member.draining)

    def forget(self, replica: str) -> None:
        """A replica has said that it is gone for good."""
        if self._fleet.drop(replica):
            self._leases.forget(replica, self._clock())
            self._serve()

    def tick(self) -> list[Lease]:
        """Expire what nobody renews; call it a few times per lease. Returns the leases that ran out."""
        now_s = self._clock()
        self._fleet.drop_silent(now_s)
        ran_out = self._leases.expire(now_s)
        self._tell()
        self._serve()
        return ran_out

    def status(self) -> RouterStatus:
        """Counts for /readyz, the autoscaler and the dashboards."""
        return RouterStatus(
            replicas=len(self._fleet),
            admitting=self._fleet.admitting,
            slots=self._fleet.slots,
            busy=len(self._leases),
            waiting=self._line.callers + self._line.recoveries,
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

    async def _ask(self, request: AcquireRequest, purpose: Purpose) -> Grant:
        claim = _claim(request, purpose)
        granted = self._leases.granted(claim, pending=purpose is Purpose.MOVE)
        holder = None if granted is None else self._fleet.get(granted.replica)
        if granted is not None and holder is not None and granted.replica not in request.avoid:
            return _grant_of(granted, holder)
        try:
            self._leases.check(claim)
        except EpochConflict as error:
            raise StaleEpoch(str(error)) from error
        former = self._line.get(request.session)
        if former is not None:
            if purpose is Purpose.CALL:
                raise NoCapacity("This conversation waits for a slot already.")
            self._dismiss(former, NoCapacity("The conversation asked again."))
        waiter = Waiter(request, purpose, claim, self._clock())
        spot = self._place(waiter) if purpose is Purpose.CALL or not self._line.urgent else None
        if purpose is Purpose.CALL:
            self._admit(request, room=spot is not None)
        if spot is not None and (purpose is not Purpose.CALL or not self._line.callers):
            return self._grant(waiter, spot)
        return await self._wait(waiter)

    def _admit(self, request: AcquireRequest, *, room: bool) -> None:
        """Returns if this caller gets a slot or may wait for one. Raises TenantLimit, NoCapacity."""
        tenant, held = request.tenant, self._leases.get(request.session) is not None
        verdict = admit(
            # One that comes back for another replica is counted already.
            tenant_busy=self._leases.held_by(tenant) + self._line.callers_of(tenant) - held,
            tenant_limit=request.tenant_limit,
            room=room,
            waiting=self._line.callers,
            max_waiting=self.config.max_waiting,
            wait_s=self._patience_s(request),
        )
        if verdict is Admission.TENANT_LIMIT:
            raise TenantLimit(f"Your limit of {request.tenant_limit} concurrent conversations is reached.")
        if verdict is Admission.NO_CAPACITY:
            raise NoCapacity("All slots are taken.")

    def _place(self, waiter: Waiter) -> Spot | None:
        request = waiter.request
        if waiter.purpose is Purpose.CALL:
            return self._fleet.place_call(request.ingress_node, request.avoid, self._line.urgent)
        suspect = standing(request.deaths) is Standing.SUSPECT
        avoid = self._avoided(waiter)
        spot = self._fleet.place_again(request.ingress_node, avoid, suspect=suspect, now_s=self._clock())
        return None if spot is not None and request.apart and spot.node == request.ingress_node else spot

    def _avoided(self, waiter: Waiter) -> tuple[str, ...]:
        if waiter.purpose is Purpose.MOVE:
            home = self._leases.get(waiter.request.session)
            return waiter.request.avoid if home is None else (*waiter.request.avoid, home.replica)
        return () if waiter.since_s + AVOID_FOR_S <= self._clock() else waiter.request.avoid

    def _grant(self, waiter: Waiter, spot: Spot) -> Grant:
        give = self._leases.prepare if waiter.purpose is Purpose.MOVE else self._leases.grant
        try:
            lease = give(waiter.claim, spot.replica, self._clock())
        except (EpochConflict, NotHeld) as conflict:
            raise StaleEpoch(str(conflict)) from conflict
        holder = self._fleet.get(spot.replica)
        assert holder is not None
        return _grant_of(lease, holder)

    async def _wait(self, waiter: Waiter) -> Grant:
        request = waiter.request
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        waiter.future = future
        wait_s = self._patience_s(request)
        self._line.join(waiter)
        taken = False
        try:
            self._serve()
            async with asyncio.timeout(wait_s):
                grant = await future
            taken = True
            return grant
        except TimeoutError:
            raise NoCapacity(f"All slots were taken for {wait_s:g} s.") from None
        finally:
            self._line.leave(waiter)
            if not taken and future.done() and not future.cancelled() and future.exception() is None:
                # The grant crossed a cancellation or the timeout: nobody will ever use it, so it goes to the next.
                grant = future.result()
                self._leases.release(grant.session, grant.epoch, request.ingress, self._clock(), opened=False)
            self._serve()

    def _patience_s(self, request: AcquireRequest) -> float:
        """A router that has just started has not heard of all replicas yet."""
        return max(request.wait_s, self._settled_at_s - self._clock())

    def _serve(self) -> None:
        """Give free slots to those who wait, in their order."""
        refused: set[tuple[bool, tuple[str, ...]]] = set()
        for waiter in self._line.first_urgent():
            like = (waiter.request.deaths > 0, self._avoided(waiter))
            if like not in refused and not self._serve_one(waiter):
                refused.add(like)  # whoever waits for the same need not be tried
        while (caller := self._line.next_caller(self._leases.held_by)) is not None:
            if not self._serve_one(caller):
                return

    def _serve_one(self, waiter: Waiter) -> bool:
        """Whether it need not wait any more."""
        future = waiter.future
        if future is None or future.done():
            self._line.leave(waiter)
            return True
        spot = self._place(waiter)
        if spot is None:
            return False
        self._line.leave(waiter)
        try:
            future.set_result(self._grant(waiter, spot))
        except StaleEpoch as error:
            future.set_exception(error)
        return True

    def _dismiss(self, waiter: Waiter, error: Exception) -> None:
        self._line.leave(waiter)
        if waiter.future is not None and not waiter.future.done():
            waiter.future.set_exception(error)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _claim(request: AcquireRequest, purpose: Purpose) -> Claim:
    return Claim(
        request.session,
        request.tenant,
        request.ingress,
        request.after_epoch,
        recovery=purpose is Purpose.RECOVERY,
        rebuilt=purpose is not Purpose.CALL,
        suspect=standing(request.deaths) is Standing.SUSPECT,
        resumable=request.resumable,
        serial=request.serial,
        unreachable=purpose is Purpose.RECOVERY and request.unreachable,
    )


def _grant_of(lease: Lease, holder: Member) -> Grant:
    report = holder.report
    return Grant(
        lease.session, lease.epoch, report.replica, report.address, report.numerics_id, lease.serial, report.node
    )

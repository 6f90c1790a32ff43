"""The session router: who gets a slot, where, and for how long. Plain asyncio; its Ray shell is router_actor.py.

It holds no truth of its own but the epochs: replicas report their slot tables, and after its death a new router
is rebuilt from those reports. All decisions are those of cluster.policy; this class keeps the queue and the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from actors.errors import NoCapacity, StaleEpoch, TenantLimit
from actors.messages import ReplicaReport
from cluster.policy.admission import Admission, admit
from cluster.policy.leases import EpochConflict, Lease, LeaseTable, NotHeld, Reported
from cluster.policy.placement import place


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """`max_waiting` bounds the queue; `lease_s` is how long a lease lives without a report from its replica."""

    lease_s: float = 3.0
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """Ask for a slot. `after_epoch` is the epoch the caller believes in force: 0 for a new conversation."""

    session: str
    tenant: str
    tenant_limit: int | None  # conversations the tenant may have at once in the whole cluster; None: no limit
    ingress: str
    ingress_node: str
    wait_s: float = 0.0
    after_epoch: int = 0
    avoid: tuple[str, ...] = ()  # replicas the caller has just failed to reach; the router has not noticed yet


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot: on which replica, where its trunk listens, and under which epoch."""

    session: str
    epoch: int
    replica: str
    address: str
    numerics_id: str


@dataclass(frozen=True, slots=True)
class ReportReply:
    """What a replica is told in answer to its report: the sessions to close, and how many callers wait."""

    close: tuple[tuple[str, int], ...]
    waiting: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The cluster in numbers. `admitting` counts replicas that take new conversations."""

    replicas: int
    admitting: int
    slots: int
    busy: int
    waiting: int
    incarnation: str


@dataclass(slots=True)
class _Replica:
    """What the router knows of one replica; `free` is kept current, since placement looks at every replica."""

    report: ReplicaReport
    adopt_until_s: float
    heard_s: float
    leases: LeaseTable
    replica: str = field(init=False)
    node: str = field(init=False)

    def __post_init__(self) -> None:
        self.replica = self.report.replica
        self.node = self.report.node

    @property
    def free(self) -> int:
        return self.report.slots - self.leases.occupied(self.replica)

    @property
    def admitting(self) -> bool:
        return self.report.admitting


class SessionRouter:
    """Grants slots, renews leases from reports, reconciles what replicas hold with what was granted."""

    def __init__(
        self, config: RouterConfig, clock: Callable[[], float] = time.monotonic, incarnation: str = "router"
    ) -> None:
        self.config = config
        self.incarnation = incarnation
        self._clock = clock
        self._leases = LeaseTable(config.lease_s)
        self._replicas: dict[str, _Replica] = {}
        self._queue: OrderedDict[str, tuple[AcquireRequest, asyncio.Future[Grant]]] = OrderedDict()
        self._queued_of: Counter[str] = Counter()

    async def acquire(self, request: AcquireRequest) -> Grant:
        """A slot for this session, at once or within `wait_s`.

        Raises TenantLimit, NoCapacity, or StaleEpoch when the session has changed hands meanwhile. Asking again
        after a lost answer gives the same grant. Cancelling it leaves nothing behind; a caller that dies without
        cancelling leaves a lease that runs out by itself.
        """
        lease = self._leases.get(request.session)
        if lease is not None and (lease.owner, lease.epoch) == (request.ingress, request.after_epoch + 1):
            holder = self._replicas.get(lease.replica)
            if holder is not None:
                return _grant_of(lease, holder)
        in_force = self._leases.epoch_in_force(request.session)
        if in_force != request.after_epoch:
            raise StaleEpoch(f"The conversation is at epoch {in_force}, not {request.after_epoch}.")
        candidate = self._place(request)
        verdict = admit(
            # One that moves is counted already.
            tenant_busy=self._leases.held_by(request.tenant) + self._queued_of[request.tenant] - (lease is not None),
            tenant_limit=request.tenant_limit,
            room=candidate is not None,
            waiting=len(self._queue),
            max_waiting=self.config.max_waiting,
            wait_s=request.wait_s,
        )
        if verdict is Admission.TENANT_LIMIT:
            raise TenantLimit(f"Your limit of {request.tenant_limit} concurrent conversations is reached.")
        if verdict is Admission.ADMIT and candidate is not None:
            return self._grant(request, candidate)
        if verdict is Admission.WAIT and request.session not in self._queue:
            return await self._wait(request)
        raise NoCapacity("All slots are taken.")

    def release(self, session: str, epoch: int, ingress: str, *, opened: bool = True) -> None:
        """Give a slot back. Raises actors.errors.StaleEpoch when this ingress does not hold it (any more)."""
        try:
            self._leases.release(session, epoch, ingress, self._clock(), opened=opened)
        except NotHeld as error:
            raise StaleEpoch(str(error)) from error
        self._serve_queue()

    def abandon(self, session: str, ingress: str) -> None:
        """Forget what an ingress asked for without learning the answer: its place in the queue, or its new lease."""
        waiting = self._queue.get(session)
        if waiting is not None and waiting[0].ingress == ingress:
            self._leave_queue(waiting[0])
            if not waiting[1].done():
                waiting[1].set_exception(NoCapacity("The caller gave up."))
        lease = self._leases.get(session)
        if lease is not None and lease.owner == ingress:
            self._leases.release(session, lease.epoch, ingress, self._clock(), opened=lease.confirmed)
            self._serve_queue()

    def report(self, report: ReplicaReport) -> ReportReply:
        """Take in a replica's heartbeat: register it, renew and reconcile its leases, serve the queue."""
        now_s = self._clock()
        known = self._replicas.get(report.replica)
        if known is None:
            # Whoever speaks to this router for the first time may hold sessions that a former router granted.
            known = _Replica(report, now_s + self.config.lease_s, now_s, self._leases)
            self._replicas[report.replica] = known
        known.report, known.heard_s, known.node = report, now_s, report.node
        busy = (Reported(slot.session, slot.epoch, slot.tenant, slot.ingress) for slot in report.busy)
        close = self._leases.reconcile(report.replica, busy, now_s, adopt=now_s < known.adopt_until_s)
        self._serve_queue()
        return ReportReply(close, len(self._queue), self.config.lease_s)

    def forget(self, replica: str) -> None:
        """A replica has said that it is gone for good."""
        self._replicas.pop(replica, None)

    def tick(self) -> list[Lease]:
        """Expire what nobody renews; call it a few times per lease. Returns the leases that ran out."""
        now_s = self._clock()
        for name, replica in list(self._replicas.items()):
            if replica.heard_s + self.config.lease_s <= now_s:
                del self._replicas[name]
        ran_out = self._leases.expire(now_s)
        self._serve_queue()
        return ran_out

    def status(self) -> RouterStatus:
        """Counts for /readyz, the autoscaler and the dashboards."""
        replicas = self._replicas.values()
        return RouterStatus(
            replicas=len(replicas),
            admitting=sum(replica.admitting for replica in replicas),
            slots=sum(replica.report.slots for replica in replicas),
            busy=len(self._leases),
            waiting=len(self._queue),
            incarnation=self.incarnation,
        )

    def _place(self, request: AcquireRequest) -> _Replica | None:
        if not request.avoid:
            return place(self._replicas.values(), request.ingress_node)
        reachable = (replica for replica in self._replicas.values() if replica.replica not in request.avoid)
        return place(reachable, request.ingress_node)

    def _grant(self, request: AcquireRequest, candidate: _Replica) -> Grant:
        try:
            lease = self._leases.grant(
                request.session,
                tenant=request.tenant,
                owner=request.ingress,
                replica=candidate.replica,
                now_s=self._clock(),
                after_epoch=request.after_epoch,
            )
        except EpochConflict as conflict:
            raise StaleEpoch(str(conflict)) from conflict
        return _grant_of(lease, candidate)

    async def _wait(self, request: AcquireRequest) -> Grant:
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._queue[request.session] = (request, future)
        self._queued_of[request.tenant] += 1
        taken = False
        try:
            async with asyncio.timeout(request.wait_s):
                grant = await future
            taken = True
            return grant
        except TimeoutError:
            raise NoCapacity(f"All slots were taken for {request.wait_s:g} s.") from None
        finally:
            self._leave_queue(request)
            if not taken and future.done() and not future.cancelled() and future.exception() is None:
                # The grant crossed a cancellation or the timeout: nobody will ever use it, so it goes to the next.
                grant = future.result()
                self._leases.release(grant.session, grant.epoch, request.ingress, self._clock(), opened=False)
            self._serve_queue()

    def _leave_queue(self, request: AcquireRequest) -> None:
        if self._queue.pop(request.session, None) is not None:
            self._queued_of[request.tenant] -= 1

    def _serve_queue(self) -> None:
        """Give free slots to those who wait, in their order."""
        while self._queue:
            request, future = next(iter(self._queue.values()))
            if future.done():
                self._leave_queue(request)
                continue
            candidate = self._place(request)
            if candidate is None:
                return
            self._leave_queue(request)
            try:
                future.set_result(self._grant(request, candidate))
            except StaleEpoch as error:
                future.set_exception(error)


def _grant_of(lease: Lease, holder: _Replica) -> Grant:
    report = holder.report
    return Grant(lease.session, lease.epoch, report.replica, report.address, report.numerics_id)

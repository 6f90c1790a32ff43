"""Where slots are asked for: a request is granted one at once, or waits its turn. The router's other half.

Who may have a slot, and which, is decided in cluster.policy, serving.fleet and serving.waiting; what is granted is in
the lease table. Here requests and free slots meet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.errors import NoCapacity, StaleEpoch, TenantLimit
from cluster.policy.admission import Admission, admit
from cluster.policy.leases import Claim, EpochConflict, LeaseTable, NotHeld
from cluster.policy.placement import Spot
from cluster.policy.quarantine import Standing, moves_at_once, standing
from serving.fleet import Fleet
from serving.routing import AcquireRequest, Grant, RouterConfig
from serving.waiting import Purpose, Waiter, WaitingLine

# One that a caller could not reach is tried again after this, if nobody else takes the conversation: it may be back.
AVOID_FOR_S = 2.0


class SlotDesk:
    """Grants slots out of a fleet, in the order of a line, into a lease table."""

    def __init__(
        self, config: RouterConfig, leases: LeaseTable, fleet: Fleet, clock: Callable[[], float], settled_at_s: float
    ) -> None:
        """settled_at_s: when a router that has just started has heard of all replicas; until then nobody is refused for
        want of a slot."""
        self._config = config
        self._leases = leases
        self._fleet = fleet
        self._clock = clock
        self._settled_at_s = settled_at_s
        self._line = WaitingLine()

    @property
    def waiting(self) -> int:
        """Those who wait and hold no slot: new callers, and conversations that have lost theirs."""
        return self._line.callers + self._line.recoveries

    async def ask(self, request: AcquireRequest, purpose: Purpose) -> Grant:
        """A slot, at once or within `wait_s`; asking again gives the same one. Cancelling it leaves nothing behind.

        Raises TenantLimit, NoCapacity, or StaleEpoch when the session has changed hands meanwhile.
        """
        claim = _claim(request, purpose)
        granted = self._leases.granted(claim, pending=purpose is Purpose.MOVE)
        grant = None if granted is None else self._fleet.grant(granted)
        if grant is not None and grant.replica not in request.avoid:
            return grant
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

    def serve(self) -> None:
        """Give free slots to those who wait, in their order."""
        refused: set[tuple[bool, tuple[str, ...]]] = set()
        for waiter in self._line.first_urgent():
            like = (waiter.request.deaths > 0, self._avoided(waiter))
            if like not in refused and not self._serve_one(waiter):
                refused.add(like)  # whoever waits for the same need not be tried
        while (caller := self._line.next_caller(self._leases.held_by)) is not None:
            if not self._serve_one(caller):
                return

    def dismiss(self, session: str, ingress: str, after_epoch: int) -> None:
        """Forget that this ingress waits with this session, as it asked naming `after_epoch`, if it does."""
        waiter = self._line.get(session)
        if waiter is not None and (waiter.request.ingress, waiter.request.after_epoch) == (ingress, after_epoch):
            self._dismiss(waiter, NoCapacity("The caller gave up."))

    def _admit(self, request: AcquireRequest, *, room: bool) -> None:
        """Returns if this caller gets a slot or may wait for one. Raises TenantLimit, NoCapacity."""
        tenant, held = request.tenant, self._leases.get(request.session) is not None
        verdict = admit(
            # One that comes back for another replica is counted already.
            tenant_busy=self._leases.held_by(tenant) + self._line.callers_of(tenant) - held,
            tenant_limit=request.tenant_limit,
            room=room,
            waiting=self._line.callers,
            max_waiting=self._config.max_waiting,
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
        at_once = self._config.rebuilds_at_once
        if waiter.purpose is Purpose.MOVE:
            at_once = moves_at_once(self._line.moves, at_once)
        spot = self._fleet.place_again(
            request.ingress_node, avoid, suspect=suspect, now_s=self._clock(), at_once=at_once
        )
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
        grant = self._fleet.grant(lease)
        assert grant is not None  # spots are the fleet's own
        return grant

    async def _wait(self, waiter: Waiter) -> Grant:
        request = waiter.request
        future: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        waiter.future = future
        wait_s = self._patience_s(request)
        self._line.join(waiter)
        taken = False
        try:
            self.serve()
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
            self.serve()

    def _patience_s(self, request: AcquireRequest) -> float:
        """A router that has just started has not heard of all replicas yet."""
        return max(request.wait_s, self._settled_at_s - self._clock())

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

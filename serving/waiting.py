"""Who waits for a slot, and whose turn it is: first those whose conversations are alive, then new callers."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from cluster.policy.admission import next_tenant
from cluster.policy.lease import Claim
from serving.routing import AcquireRequest, Grant


class Purpose(IntEnum):
    """What a slot is asked for; in the order of who goes first."""

    RECOVERY = 0
    MOVE = 1
    CALL = 2


@dataclass(slots=True, eq=False)
class Waiter:
    """One who asks, and may have to wait: then the future gets the grant, or the error that ends the waiting."""

    request: AcquireRequest
    purpose: Purpose
    claim: Claim
    since_s: float
    future: asyncio.Future[Grant] | None = None


class WaitingLine:
    """At most one waiter for each session. Within a purpose in the order they came, but that new callers are taken
    from the tenant that has the fewest conversations."""

    def __init__(self) -> None:
        self._urgent: dict[Purpose, OrderedDict[str, Waiter]] = {p: OrderedDict() for p in Purpose if p < Purpose.CALL}
        self._callers: OrderedDict[str, OrderedDict[str, Waiter]] = OrderedDict()  # by tenant
        self._of: dict[str, Waiter] = {}

    @property
    def callers(self) -> int:
        """New callers."""
        return len(self._of) - self.urgent

    @property
    def urgent(self) -> int:
        """Those whose conversations are alive."""
        return sum(len(waiting) for waiting in self._urgent.values())

    @property
    def recoveries(self) -> int:
        return len(self._urgent[Purpose.RECOVERY])

    @property
    def moves(self) -> int:
        return len(self._urgent[Purpose.MOVE])

    def callers_of(self, tenant: str) -> int:
        return len(self._callers.get(tenant, ()))

    def get(self, session: str) -> Waiter | None:
        return self._of.get(session)

    def join(self, waiter: Waiter) -> None:
        """Behind all others of its kind. Raises ValueError when somebody waits for this session already."""
        session = waiter.request.session
        if session in self._of:
            raise ValueError(f"session {session} waits already")
        self._of[session] = waiter
        if waiter.purpose is Purpose.CALL:
            self._callers.setdefault(waiter.request.tenant, OrderedDict())[session] = waiter
        else:
            self._urgent[waiter.purpose][session] = waiter

    def leave(self, waiter: Waiter) -> None:
        """Twice is no error."""
        session, tenant = waiter.request.session, waiter.request.tenant
        if self._of.get(session) is not waiter:
            return
        del self._of[session]
        if waiter.purpose is not Purpose.CALL:
            del self._urgent[waiter.purpose][session]
            return
        del self._callers[tenant][session]
        if not self._callers[tenant]:
            del self._callers[tenant]

    def first_urgent(self) -> Iterator[Waiter]:
        """All urgent ones, in their order; they may leave meanwhile."""
        for purpose in self._urgent:
            yield from list(self._urgent[purpose].values())

    def next_caller(self, held_by: Callable[[str], int]) -> Waiter | None:
        """The new caller whose turn it is."""
        if not self._callers:
            return None
        return next(iter(self._callers[next_tenant(self._callers, held_by)].values()))

"""How long a conversation may stay: orphans until their grace is over, all of them until the replica is to be emptied.

Leases. The router renews a replica's leases by answering its reports. While its trunk lives, a conversation is renewed
by that as well: the ingress at the other end is its one owner, whatever has become of the router, and a router's death
costs nobody a word. An orphan has no owner to renew it. Where the router has not been heard for a lease, and for as
long on top as one may take that dies with Ray's head, it may have been given up, so it goes. (Its slot is promised to
nobody meanwhile: of a replica that is silent no router gives slots, and one that is heard again says what it holds.)

Drains. An orphan cannot be moved: moves are its ingress's, which is gone. A replica that is to go waits for its client
a few seconds, since whoever comes back takes it along, and not the whole grace: its machine may be gone by then.
"""

from __future__ import annotations

import asyncio
import logging
import math

from actors.calls import Calls
from actors.errors import StaleEpoch
from actors.interfaces import Clock, ReplicaSettings
from actors.messages import Move

log = logging.getLogger(__name__)

TICK_S = 0.25
ROUTER_AWAY_S = 20.0
LAST_ORPHANS_S = 5.0  # how long a drained replica waits for nobody but lost clients; it is to be gone within 10 s


class Tenure:
    """`watch` has to run for anything to happen by itself."""

    def __init__(self, calls: Calls, settings: ReplicaSettings, clock: Clock) -> None:
        self._calls, self._settings, self._clock = calls, settings, clock
        self._lease_until_s = math.inf  # until a router has said what a lease is
        self._next_move_s = math.inf
        self.draining = False
        self._draining_s = math.inf  # since when

    async def watch(self) -> None:
        """Looks after everything a few times a second."""
        never = asyncio.Event()
        while True:
            try:
                await self._clock.wait_for(never.wait(), TICK_S)
            except TimeoutError:
                self.tick()

    def drain(self) -> None:
        """From now on every conversation is asked to leave, again and again."""
        self.draining = True
        self._draining_s = self._clock.now()
        self._ask_to_leave()

    def renewed(self, at_s: float, lease_s: float) -> None:
        """The router has answered a report that was sent at `at_s` of this replica's own clock: leases, counted by the
        router from when it came, last no less than `lease_s` from then."""
        self._lease_until_s = at_s + lease_s + ROUTER_AWAY_S

    def tick(self) -> None:
        now_s = self._clock.now()
        deserted = all(call.orphan for call in self._calls)
        for call in list(self._calls):
            if call.orphaned_s is None:
                continue
            if now_s >= call.orphaned_s + self._settings.resume_grace_s:
                log.info("session %s was not resumed within %g s", call.session, self._settings.resume_grace_s)
                self._calls.end(call, None)
            elif deserted and now_s >= max(call.orphaned_s, self._draining_s) + LAST_ORPHANS_S:
                log.warning("session %s was not resumed before its replica had to go", call.session)
                self._calls.end(call, None)
            elif now_s >= self._lease_until_s:
                log.warning("session %s has neither a trunk nor a lease any more", call.session)
                self._calls.end(call, StaleEpoch("The lease of the conversation has ended."))
        if self.draining and now_s >= self._next_move_s:
            self._ask_to_leave()

    def _ask_to_leave(self) -> None:
        self._next_move_s = self._clock.now() + self._settings.move_every_s
        for call in list(self._calls):
            self._calls.tell(call, Move(call.session, call.epoch, "drain"))  # an orphan's sink hears nothing

"""Who owns which conversation: leases with owner, epoch and expiry. The only place where an epoch rises.

A lease is *active* while its replica renews it. One that ended is *quarantined* for one more lease: its replica
may be cut off and still speaking, or not have heard yet, so the slot is not given away until that replica's own
clock must have ended it too, or the replica itself says that the slot is free.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace


class LeaseError(Exception):
    """Base of what the lease table refuses."""


class EpochConflict(LeaseError):
    """Compare-and-set failed: the conversation's epoch is not the one the caller believed in."""

    def __init__(self, session: str, expected: int, in_force: int) -> None:
        super().__init__(session, expected, in_force)
        self.in_force = in_force

    def __str__(self) -> str:
        session, expected, in_force = self.args
        return f"session {session} is at epoch {in_force}, not {expected}: ask again with the epoch in force"


class NotHeld(LeaseError):
    """Renewing or releasing what one does not hold; a second release ends here too."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One conversation's claim on one slot of one replica. `confirmed`: the replica has reported it."""

    session: str
    epoch: int
    tenant: str
    owner: str  # the ingress that carries the conversation
    replica: str
    expires_s: float
    confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Reported:
    """One busy slot in a replica's own table."""

    session: str
    epoch: int
    tenant: str
    owner: str


@dataclass(frozen=True, slots=True)
class _Quarantine:
    lease: Lease
    until_s: float
    revivable: bool  # it ran out for want of a renewal, nobody ended it


class LeaseTable:
    """All leases of a cluster. It alone counts who holds what; time is an argument, in seconds of any clock."""

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._active: dict[str, Lease] = {}
        self._quarantined: dict[tuple[str, int], _Quarantine] = {}
        self._past: dict[str, tuple[int, float]] = {}  # ended sessions: highest epoch, and until when to remember
        self._of_replica: defaultdict[str, set[str]] = defaultdict(set)
        self._quarantined_on: Counter[str] = Counter()
        self._occupied: Counter[str] = Counter()  # active and quarantined; placement asks for it of every replica
        self._of_tenant: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._active)

    def get(self, session: str) -> Lease | None:
        """The active lease of a session."""
        return self._active.get(session)

    def occupied(self, replica: str) -> int:
        """Slots of a replica that are held, or may still be."""
        return self._occupied[replica]

    def held_by(self, tenant: str) -> int:
        """Conversations a tenant has now."""
        return self._of_tenant[tenant]

    def epoch_in_force(self, session: str) -> int:
        """The highest epoch this table knows of; 0 for a session it has never heard of."""
        lease = self._active.get(session)
        if lease is not None:
            return lease.epoch
        return self._past.get(session, (0, 0.0))[0]

    def grant(
        self, session: str, *, tenant: str, owner: str, replica: str, now_s: float, after_epoch: int = 0
    ) -> Lease:
        """Give a session to a replica under the next epoch.

        Compare-and-set: `after_epoch` must be the epoch in force (0 for a new session), else EpochConflict. A
        lease that was active until now goes to quarantine: its replica does not know yet that it is over.
        """
        in_force = self.epoch_in_force(session)
        if in_force != after_epoch:
            raise EpochConflict(session, after_epoch, in_force)
        former = self._active.get(session)
        if former is not None:
            self._quarantine(former, now_s)
        self._past.pop(session, None)
        lease = Lease(session, in_force + 1, tenant, owner, replica, now_s + self.lease_s)
        self._insert(lease)
        return lease

    def release(self, session: str, epoch: int, owner: str, now_s: float, *, opened: bool = True) -> Lease:
        """Give a lease back. Raises NotHeld unless exactly this owner holds exactly this epoch.

        The slot is free again when its replica reports so, or at once if the replica was never asked to open it
        (`opened` false).
        """
        lease = self._active.get(session)
        if lease is None or lease.epoch != epoch or lease.owner != owner:
            raise NotHeld(f"{owner} does not hold session {session} at epoch {epoch}")
        if opened:
            self._quarantine(lease, now_s)
        else:
            self._remove(lease)
        self._remember(lease, now_s)
        return lease

    def reconcile(
        self, replica: str, reported: Iterable[Reported], now_s: float, *, adopt: bool
    ) -> tuple[tuple[str, int], ...]:
        """Take a replica's slot table for the truth about its slots; return the (session, epoch) it must close.

        Its leases that are in the report are renewed, those that had been confirmed and are gone are ended. Those
        never confirmed stay until they expire: the session may still be on its way to the replica. A session
        that no lease owns is closed, or with `adopt` (a router that has just started, and rebuilds itself) taken
        over as it is, unless a higher epoch is known.
        """
        to_close: list[tuple[str, int]] = []
        seen: set[tuple[str, int]] = set()
        for slot in reported:
            seen.add((slot.session, slot.epoch))
            lease = self._active.get(slot.session)
            if lease is not None and (lease.epoch, lease.replica) == (slot.epoch, replica):
                self._active[slot.session] = replace(lease, expires_s=now_s + self.lease_s, confirmed=True)
            elif not self._take_over(replica, slot, now_s, adopt):
                to_close.append((slot.session, slot.epoch))
        for session in tuple(self._of_replica.get(replica, ())):
            lease = self._active[session]
            if lease.confirmed and (session, lease.epoch) not in seen:
                self._remove(lease)
                self._remember(lease, now_s)
        if self._quarantined_on[replica]:
            for key, entry in tuple(self._quarantined.items()):
                if entry.lease.replica == replica and entry.lease.confirmed and key not in seen:
                    self._end_quarantine(key)
        return tuple(to_close)

    def expire(self, now_s: float) -> list[Lease]:
        """Quarantine every lease that ran out, free every slot whose quarantine ended; return the former."""
        ran_out = [lease for lease in self._active.values() if lease.expires_s <= now_s]
        for lease in ran_out:
            self._quarantine(lease, now_s, revivable=True)
            self._remember(lease, now_s)
        for key in [key for key, entry in self._quarantined.items() if entry.until_s <= now_s]:
            self._end_quarantine(key)
        for session in [session for session, (_, until_s) in self._past.items() if until_s <= now_s]:
            del self._past[session]
        return ran_out

    def _take_over(self, replica: str, slot: Reported, now_s: float, adopt: bool) -> bool:
        key = (slot.session, slot.epoch)
        entry = self._quarantined.get(key)
        known = self.epoch_in_force(slot.session)
        if entry is not None and entry.revivable and entry.lease.replica == replica and known == slot.epoch:
            self._end_quarantine(key)  # it was cut off, not dead, and nobody else has got the session since
        elif not adopt or known >= slot.epoch:
            return False
        former = self._active.get(slot.session)
        if former is not None:
            self._quarantine(former, now_s)
        self._past.pop(slot.session, None)
        expires_s = now_s + self.lease_s
        self._insert(Lease(slot.session, slot.epoch, slot.tenant, slot.owner, replica, expires_s, confirmed=True))
        return True

    def _insert(self, lease: Lease) -> None:
        self._active[lease.session] = lease
        self._of_replica[lease.replica].add(lease.session)
        self._count(self._occupied, lease.replica, 1)
        self._count(self._of_tenant, lease.tenant, 1)

    def _remove(self, lease: Lease) -> None:
        del self._active[lease.session]
        on_replica = self._of_replica[lease.replica]
        on_replica.discard(lease.session)
        if not on_replica:
            del self._of_replica[lease.replica]
        self._count(self._occupied, lease.replica, -1)
        self._count(self._of_tenant, lease.tenant, -1)

    def _remember(self, lease: Lease, now_s: float) -> None:
        # Reports written before the end are still on their way; two leases is longer than any of them lives.
        self._past[lease.session] = (lease.epoch, now_s + 2 * self.lease_s)

    def _quarantine(self, lease: Lease, now_s: float, *, revivable: bool = False) -> None:
        self._remove(lease)
        self._quarantined[lease.session, lease.epoch] = _Quarantine(lease, now_s + self.lease_s, revivable)
        self._count(self._quarantined_on, lease.replica, 1)
        self._count(self._occupied, lease.replica, 1)

    def _end_quarantine(self, key: tuple[str, int]) -> None:
        replica = self._quarantined.pop(key).lease.replica
        self._count(self._quarantined_on, replica, -1)
        self._count(self._occupied, replica, -1)

    @staticmethod
    def _count(of: Counter[str], name: str, by: int) -> None:
        of[name] += by
        if not of[name]:
            del of[name]  # names come and go for years; only those in use are kept

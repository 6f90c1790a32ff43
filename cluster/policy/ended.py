"""Slots whose lease has ended and which are not given away yet: their replica may still be speaking from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.policy.lease import Key, Lease


@dataclass(frozen=True, slots=True)
class _Ended:
    lease: Lease
    until_s: float
    revivable: bool


class EndedSlots:
    """One entry for each lease that has ended and may still have its slot; times in seconds of any clock."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._entries: dict[Key, _Ended] = {}
        self._on: dict[str, set[Key]] = {}

    def count(self, replica: str) -> int:
        return len(self._on.get(replica, ()))

    def add(self, lease: Lease, now_s: float, *, revivable: bool) -> None:
        """`revivable`: it ran out for want of a renewal, nobody ended it."""
        self._entries[lease.key] = _Ended(lease, now_s + self._lease_s, revivable)
        self._on.setdefault(lease.replica, set()).add(lease.key)

    def revivable(self, replica: str, key: Key) -> Lease | None:
        """The lease of a replica that was cut off, not dead."""
        entry = self._entries.get(key)
        return entry.lease if entry is not None and entry.revivable and entry.lease.replica == replica else None

    def drop(self, key: Key) -> None:
        lease = self._entries.pop(key).lease
        keys = self._on[lease.replica]
        keys.discard(key)
        if not keys:
            del self._on[lease.replica]

    def reported(self, replica: str, seen: Mapping[str, int], now_s: float) -> bool:
        """A replica's report: what it holds still stays for another lease, what it had confirmed and holds no more is
        free. Returns whether anything became free."""
        freed = False
        for key in tuple(self._on.get(replica, ())):
            entry = self._entries[key]
            if entry.lease.is_in(seen):
                self._entries[key] = _Ended(entry.lease, now_s + self._lease_s, entry.revivable)
            elif entry.lease.confirmed:
                self.drop(key)
                freed = True
        return freed

    def forget(self, replica: str) -> None:
        for key in tuple(self._on.get(replica, ())):
            self.drop(key)

    def expire(self, now_s: float) -> set[str]:
        """Drop what is over; returns the replicas that have slots free by it."""
        over = [key for key, entry in self._entries.items() if entry.until_s <= now_s]
        replicas = {self._entries[key].lease.replica for key in over}
        for key in over:
            self.drop(key)
        return replicas

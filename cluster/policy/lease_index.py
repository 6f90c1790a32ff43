"""The leases that hold a slot, counted by replica and tenant as they come and go, so that nobody counts them anew."""

from __future__ import annotations

from collections import Counter

from cluster.policy.lease import Key, Lease


class LeaseIndex:
    """Every lease that is active or pending. A lease that changes is taken out and put in again."""

    def __init__(self) -> None:
        self._on: dict[str, dict[Key, Lease]] = {}  # by replica
        self._unconfirmed: dict[Key, Lease] = {}
        self._arriving: Counter[str] = Counter()  # by replica
        self._of_tenant: Counter[str] = Counter()
        self._changed: set[str] = set()

    def find(self, replica: str, key: Key) -> Lease | None:
        return self._on.get(replica, {}).get(key)

    def on(self, replica: str) -> tuple[Lease, ...]:
        """The leases of a replica."""
        return tuple(self._on.get(replica, {}).values())

    def count(self, replica: str) -> int:
        """How many leases a replica has."""
        return len(self._on.get(replica, ()))

    def arriving(self, replica: str) -> int:
        """Those of a replica that it has yet to rebuild."""
        return self._arriving[replica]

    def held_by(self, tenant: str) -> int:
        """Active leases of a tenant."""
        return self._of_tenant[tenant]

    def unconfirmed(self) -> tuple[Lease, ...]:
        """Those that no replica has reported yet."""
        return tuple(self._unconfirmed.values())

    def take_changed(self) -> set[str]:
        """The replicas that `changed` since this was last asked."""
        changed, self._changed = self._changed, set()
        return changed

    def changed(self, *replicas: str) -> None:
        """Something of these replicas is otherwise than it was."""
        self._changed.update(replicas)

    def put(self, lease: Lease, *, active: bool) -> None:
        self._on.setdefault(lease.replica, {})[lease.key] = lease
        if active:
            self._of_tenant[lease.tenant] += 1
        if not lease.confirmed:
            self._unconfirmed[lease.key] = lease
        if lease.arriving:
            self._arriving[lease.replica] += 1
        self.changed(lease.replica)

    def take(self, lease: Lease, *, active: bool) -> None:
        """Raises KeyError for one that is not in it."""
        on = self._on[lease.replica]
        del on[lease.key]
        if not on:
            del self._on[lease.replica]
        if active:
            _less(self._of_tenant, lease.tenant)
        self._unconfirmed.pop(lease.key, None)
        if lease.arriving:
            _less(self._arriving, lease.replica)
        self.changed(lease.replica)


def _less(of: Counter[str], name: str) -> None:
    of[name] -= 1
    if not of[name]:
        del of[name]  # names come and go for years; only those in use are kept

"""The slots of one replica: who holds which. Nobody else counts them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from actors.errors import NoCapacity


class NotHeld(LookupError):
    """A release of a slot by somebody who does not hold it: a mistake in the caller, never a user's."""


class AlreadyHeld(LookupError):
    """A second slot for a session that has one."""


@dataclass(frozen=True, slots=True)
class SlotLease:
    """The right to one slot. It names its owner, so that it opens no door once the slot has moved on.

    `serial` differs between two leases of the same owner on the same slot: a release that arrives twice
    stays harmless even when the owner came back in between.
    """

    slot: int
    session: str
    epoch: int
    tenant: str
    serial: int


class SlotTable:
    """Leases `slots` slots. The lowest free slot goes first: codec groups of neighbouring slots stay full, and
    a group of empty slots costs nothing."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"a replica needs at least one slot, got {slots}")
        self.slots = slots
        self._free = list(range(slots))  # a heap; a sorted list is one
        self._held: dict[int, SlotLease] = {}
        self._by_session: dict[str, SlotLease] = {}
        self._serial = 0

    @property
    def busy(self) -> int:
        return len(self._held)

    @property
    def free(self) -> int:
        return len(self._free)

    def acquire(self, session: str, epoch: int, tenant: str) -> SlotLease:
        """Leases the lowest free slot. Raises NoCapacity when all are taken, AlreadyHeld when the session, at
        whatever epoch, has one: its old slot must be closed in the stages and released first."""
        held = self._by_session.get(session)
        if held is not None:
            raise AlreadyHeld(f"session {session} already holds slot {held.slot} at epoch {held.epoch}")
        if not self._free:
            raise NoCapacity(f"All {self.slots} slots of this replica are taken.")
        self._serial += 1
        lease = SlotLease(heapq.heappop(self._free), session, epoch, tenant, self._serial)
        self._held[lease.slot] = lease
        self._by_session[session] = lease
        return lease

    def release(self, lease: SlotLease) -> None:
        """Gives the slot back. Raises NotHeld unless `lease` is the very lease in force."""
        if self._held.get(lease.slot) != lease:
            holder = self._held.get(lease.slot)
            now = "is free" if holder is None else f"belongs to session {holder.session} at epoch {holder.epoch}"
            raise NotHeld(f"session {lease.session} at epoch {lease.epoch} gave back slot {lease.slot}, which {now}")
        del self._held[lease.slot]
        del self._by_session[lease.session]
        heapq.heappush(self._free, lease.slot)

    def holder(self, slot: int) -> SlotLease | None:
        return self._held.get(slot)

    def leases(self) -> tuple[SlotLease, ...]:
        """All leases in force, by slot."""
        return tuple(self._held[slot] for slot in sorted(self._held))

"""Slot table: leases with owners, against a model, through thousands of random histories."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from actors.errors import NoCapacity
from actors.slots import AlreadyHeld, NotHeld, SlotLease, SlotTable

SLOTS = 4


class SlotMachine(RuleBasedStateMachine):
    """Sessions come and go, release twice, release what others hold."""

    leases = Bundle("leases")
    spent = Bundle("spent")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(SLOTS)
        self.held: dict[int, SlotLease] = {}

    @rule(target=leases, session=st.sampled_from("abcdefgh"), epoch=st.integers(0, 3), tenant=st.sampled_from("xyz"))
    def acquire(self, session: str, epoch: int, tenant: str) -> SlotLease | None:
        if any(lease.session == session for lease in self.held.values()):
            with pytest.raises(AlreadyHeld):
                self.table.acquire(session, epoch, tenant)
            return None
        if len(self.held) == SLOTS:
            with pytest.raises(NoCapacity):
                self.table.acquire(session, epoch, tenant)
            return None
        lease = self.table.acquire(session, epoch, tenant)
        assert lease.slot == min(set(range(SLOTS)) - set(self.held))
        self.held[lease.slot] = lease
        return lease

    @rule(target=spent, lease=consumes(leases))
    def release(self, lease: SlotLease | None) -> SlotLease | None:
        if lease is not None:
            self.table.release(lease)
            del self.held[lease.slot]
        return lease

    @rule(lease=spent)
    def release_again(self, lease: SlotLease | None) -> None:
        """Whoever holds the slot by now, even the same owner come back, keeps it."""
        if lease is not None:
            with pytest.raises(NotHeld):
                self.table.release(lease)

    @invariant()
    def books_agree(self) -> None:
        assert self.table.leases() == tuple(self.held[slot] for slot in sorted(self.held))
        assert (self.table.busy, self.table.free) == (len(self.held), SLOTS - len(self.held))
        for slot in range(SLOTS):
            assert self.table.holder(slot) == self.held.get(slot)


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_lowest_free_slot_goes_first() -> None:
    table = SlotTable(3)
    leases = [table.acquire(name, 0, "t") for name in "abc"]
    table.release(leases[2])
    table.release(leases[0])
    assert [table.acquire(name, 0, "t").slot for name in "de"] == [0, 2]


def test_a_forged_lease_frees_nothing() -> None:
    table = SlotTable(2)
    mine = table.acquire("a", 1, "t")
    with pytest.raises(NotHeld, match="belongs to session a"):
        table.release(SlotLease(mine.slot, "b", 1, "t", mine.serial))
    with pytest.raises(NotHeld, match="is free"):
        table.release(SlotLease(1, "a", 1, "t", mine.serial))
    assert table.holder(mine.slot) == mine


def test_a_replica_has_at_least_one_slot() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SlotTable(0)

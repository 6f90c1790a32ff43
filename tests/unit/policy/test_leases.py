"""Leases: compare-and-set, expiry, quarantine, reconciliation, and that nothing is counted twice or lost."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cluster.policy.leases import Claim, EpochConflict, LeaseTable, NotHeld, Reported

LEASE_S = 3.0


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(LEASE_S)


def grant(table: LeaseTable, session: str = "s", now_s: float = 0.0, after_epoch: int = 0, replica: str = "r") -> int:
    return table.grant(Claim(session, "t", "i", after_epoch), replica, now_s).epoch


def report(
    table: LeaseTable, *slots: tuple[str, int], now_s: float = 0.0, adopt: bool = False, replica: str = "r"
) -> tuple[tuple[str, int], ...]:
    reported = [Reported(session, epoch, "t", "i") for session, epoch in slots]
    return table.reconcile(replica, reported, now_s, adopt=adopt)


def test_epochs_rise_by_compare_and_set_alone(table: LeaseTable) -> None:
    assert grant(table) == 1
    with pytest.raises(EpochConflict) as conflict:
        grant(table)
    assert conflict.value.in_force == 1
    assert grant(table, after_epoch=1, replica="other") == 2
    with pytest.raises(EpochConflict):
        grant(table, after_epoch=1)


def test_release_wants_the_owner_and_the_epoch_and_works_once(table: LeaseTable) -> None:
    grant(table)
    for session, epoch, owner in (("s", 2, "i"), ("s", 1, "stranger"), ("other", 1, "i")):
        with pytest.raises(NotHeld):
            table.release(session, epoch, owner, 0.0)
    table.release("s", 1, "i", 0.0)
    with pytest.raises(NotHeld):
        table.release("s", 1, "i", 0.0)


def test_a_released_slot_is_free_when_its_replica_says_so(table: LeaseTable) -> None:
    grant(table)
    report(table, ("s", 1))
    table.release("s", 1, "i", 0.0)
    assert table.held_by("t") == 0  # the tenant may call again at once
    assert table.occupied("r") == 1
    assert report(table, ("s", 1)) == (("s", 1),)  # still there: told to close, not taken back
    assert table.occupied("r") == 1
    report(table)
    assert table.occupied("r") == 0


def test_a_slot_that_was_never_opened_is_free_at_once(table: LeaseTable) -> None:
    grant(table)
    table.release("s", 1, "i", 0.0, opened=False)
    assert table.occupied("r") == 0


def test_a_lease_runs_out_into_quarantine_for_one_lease(table: LeaseTable) -> None:
    grant(table)
    assert table.expire(LEASE_S - 0.1) == []
    assert [lease.session for lease in table.expire(LEASE_S)] == ["s"]
    assert (table.held_by("t"), table.occupied("r")) == (0, 1)
    table.expire(2 * LEASE_S)
    assert table.occupied("r") == 0


def test_reports_renew(table: LeaseTable) -> None:
    grant(table)
    report(table, ("s", 1), now_s=2.0)
    assert table.expire(LEASE_S + 1.0) == []


def test_a_lease_on_its_way_to_the_replica_survives_reports_without_it(table: LeaseTable) -> None:
    grant(table)
    assert report(table) == ()
    assert table.get("s") is not None


def test_a_confirmed_lease_ends_when_its_replica_no_longer_has_it(table: LeaseTable) -> None:
    grant(table)
    report(table, ("s", 1))
    report(table)
    assert table.get("s") is None
    assert (table.held_by("t"), table.occupied("r")) == (0, 0)


def test_a_replica_that_was_cut_off_gets_its_session_back_unless_it_has_moved(table: LeaseTable) -> None:
    grant(table)
    report(table, ("s", 1))
    table.expire(LEASE_S)
    assert report(table, ("s", 1), now_s=LEASE_S + 1) == ()
    assert table.get("s") is not None
    table.expire(3 * LEASE_S)
    assert grant(table, after_epoch=1, replica="other", now_s=3 * LEASE_S) == 2
    assert report(table, ("s", 1), now_s=3 * LEASE_S) == (("s", 1),)


def test_a_new_router_lets_a_conversation_move_whose_former_move_came_to_nothing(table: LeaseTable) -> None:
    """Its owner was given epochs that no replica reports; nobody is given them again."""
    report(table, ("s", 3), adopt=True)
    with pytest.raises(EpochConflict):
        table.prepare(Claim("s", "t", "stranger", 5), "other", 0.0)
    assert table.prepare(Claim("s", "t", "i", 5), "other", 0.0).epoch == 6
    table.commit("s", 6, "i", 0.0)
    with pytest.raises(EpochConflict):  # this one knows what it has granted
        table.prepare(Claim("s", "t", "i", 8), "r", 0.0)


def test_both_ends_of_a_move_may_fall_silent_at_once(table: LeaseTable) -> None:
    """The one it moves to takes the place of its home, and is lost as well."""
    grant(table)
    report(table, ("s", 1))
    table.prepare(Claim("s", "t", "i", 1), "other", 0.0)
    report(table, ("s", 2), replica="other")
    assert {lease.replica for lease in table.expire(LEASE_S)} == {"r", "other"}
    assert (table.get("s"), table.pending("s"), len(table), table.held_by("t")) == (None, None, 0, 0)
    assert (table.occupied("r"), table.occupied("other")) == (1, 1)  # in quarantine
    table.expire(2 * LEASE_S)
    assert (table.occupied("r"), table.occupied("other")) == (0, 0)


def test_what_no_lease_owns_is_closed_or_adopted_with_the_highest_epoch(table: LeaseTable) -> None:
    assert report(table, ("s", 7)) == (("s", 7),)
    assert report(table, ("s", 7), adopt=True) == ()
    assert report(table, ("s", 6), adopt=True, replica="zombie") == (("s", 6),)
    assert report(table, ("s", 8), adopt=True, replica="newer") == ()
    lease = table.get("s")
    assert lease is not None
    assert (lease.epoch, lease.replica) == (8, "newer")
    assert table.occupied("r") == 1  # in quarantine: the zombie does not know yet


def test_a_late_report_does_not_bring_back_what_was_released(table: LeaseTable) -> None:
    grant(table)
    report(table, ("s", 1))
    table.release("s", 1, "i", 0.0)
    assert report(table, ("s", 1), adopt=True) == (("s", 1),)


class LeaseMachine(RuleBasedStateMachine):
    """Random lives of sessions on replicas that may be cut off; the model counts what the table must."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(LEASE_S)
        self.now_s = 0.0
        self.count = 0
        self.highest: dict[str, int] = {}
        self.slots: dict[str, dict[str, int]] = {"r1": {}, "r2": {}}  # what each replica really holds

    @rule(target=sessions, replica=st.sampled_from(["r1", "r2"]), arrives=st.booleans())
    def opened(self, replica: str, arrives: bool) -> str:
        session = f"s{self.count}"
        self.count += 1
        self._grant(session, replica, 0, arrives)
        return session

    @rule(session=sessions, replica=st.sampled_from(["r1", "r2"]), arrives=st.booleans())
    def moved(self, session: str, replica: str, arrives: bool) -> None:
        in_force = self.table.epoch_in_force(session)
        if in_force:
            self._grant(session, replica, in_force, arrives)

    def _grant(self, session: str, replica: str, after_epoch: int, arrives: bool) -> None:
        lease = self.table.grant(Claim(session, "t", "i", after_epoch), replica, self.now_s)
        assert lease.epoch > self.highest.get(session, 0)
        self.highest[session] = lease.epoch
        if arrives:
            self.slots[replica][session] = lease.epoch

    @rule(session=sessions, replica=st.sampled_from(["r1", "r2"]), arrives=st.booleans())
    def begins_to_move(self, session: str, replica: str, arrives: bool) -> None:
        lease = self.table.get(session)
        if lease is None or lease.replica == replica:
            return
        pending = self.table.prepare(Claim(session, "t", "i", lease.epoch), replica, self.now_s)
        assert pending.epoch > self.highest[session]
        self.highest[session] = pending.epoch
        if arrives:
            self.slots[replica][session] = pending.epoch

    @rule(session=sessions)
    def ends_its_move(self, session: str) -> None:
        pending = self.table.pending(session)
        if pending is not None:
            self.table.commit(session, pending.epoch, "i", self.now_s)

    @rule(target=sessions, session=consumes(sessions), told=st.booleans())
    def released(self, session: str, told: bool) -> object:
        lease = self.table.get(session)
        if lease is None:
            return session
        self.table.release(session, lease.epoch, "i", self.now_s)
        if told and self.slots[lease.replica].get(session) == lease.epoch:
            del self.slots[lease.replica][session]
        return multiple()

    @rule(replica=st.sampled_from(["r1", "r2"]))
    def reports(self, replica: str) -> None:
        held = self.slots[replica]
        reported = [Reported(session, epoch, "t", "i") for session, epoch in held.items()]
        for session, epoch in self.table.reconcile(replica, reported, self.now_s, adopt=False):
            assert held[session] == epoch
            del held[session]
        for session, epoch in held.items():  # whoever was not told to close owns a lease, or is where it is moving to
            leases = (self.table.get(session), self.table.pending(session))
            assert (epoch, replica) in [(lease.epoch, lease.replica) for lease in leases if lease is not None]

    @rule(by_s=st.floats(0.1, 4.0))
    def time_passes(self, by_s: float) -> None:
        self.now_s += by_s
        self.table.expire(self.now_s)

    @invariant()
    def counts_agree(self) -> None:
        active = [lease for session in self.highest if (lease := self.table.get(session))]
        assert len(active) == len(self.table) == self.table.held_by("t")
        for replica in self.slots:
            coming = [lease for session in self.highest if (lease := self.table.pending(session))]
            assert self.table.occupied(replica) >= sum(lease.replica == replica for lease in (*active, *coming))

    def teardown(self) -> None:
        for session in list(self.highest):
            lease = self.table.get(session)
            if lease is not None:
                self.table.release(session, lease.epoch, "i", self.now_s)
        self.table.expire(self.now_s + 3 * LEASE_S)
        assert len(self.table) == self.table.held_by("t") == 0
        assert all(self.table.occupied(replica) == 0 for replica in self.slots)


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

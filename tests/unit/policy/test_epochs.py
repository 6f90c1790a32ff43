"""Epochs by themselves: what a claim may name, and that none is given twice, to whomever and by whomever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.epochs import Epochs
from cluster.policy.lease import Claim, EpochConflict, Lease

REMEMBERED_S = 6.0
LEASE = Lease("s", 5, "t", "i", "r", granted_s=0.0, after_epoch=4, serial=1)


@pytest.fixture
def epochs() -> Epochs:
    epochs = Epochs(before=1000, remembered_s=REMEMBERED_S)
    epochs.given("s", LEASE.epoch)
    return epochs


def test_a_session_of_which_all_is_known_counts_by_one(epochs: Epochs) -> None:
    assert epochs.next("s", 5, LEASE) == 6
    epochs.given("s", 6)  # for a move, which comes to nothing
    assert epochs.next("s", 5, LEASE) == epochs.next("s", 6, LEASE) == 7
    assert epochs.next("new", 0, None) == 1


def test_one_of_which_a_former_table_may_know_more_counts_from_beyond_it(epochs: Epochs) -> None:
    assert epochs.next("s", 6, LEASE) == 1001  # its owner has been given more than we know
    assert epochs.next("s", 5, replace(LEASE, adopted=True)) == 1001
    assert epochs.next("s", 2000, LEASE) == 2001


def test_an_ended_session_is_remembered_for_a_while_and_its_epochs_are_never_given_again(epochs: Epochs) -> None:
    epochs.given("s", 3000)
    epochs.ended(LEASE, now_s=10.0)
    epochs.expire(10.0 + REMEMBERED_S - 0.1)
    assert epochs.last_of_ended("s") == LEASE
    assert epochs.highest("s") == 3000
    epochs.expire(10.0 + REMEMBERED_S)
    assert epochs.last_of_ended("s") is None
    assert epochs.highest("s") == 0
    assert epochs.next("s", 5, None) == 3001


def test_one_that_goes_on_is_not_forgotten(epochs: Epochs) -> None:
    epochs.ended(LEASE, now_s=0.0)
    epochs.begun("s")
    epochs.expire(2 * REMEMBERED_S)
    assert epochs.highest("s") == LEASE.epoch


@pytest.mark.parametrize(
    ("last", "claim"),
    [
        (None, Claim("s", "t", "i")),
        (None, Claim("s", "t", "i", 9, recovery=True)),
        (LEASE, Claim("s", "t", "i", 5)),
        (LEASE, Claim("s", "t", "other", 5)),
        (LEASE, Claim("s", "t", "i", 9, recovery=True)),
        (LEASE, Claim("s", "t", "i", 3, recovery=True, serial=1)),  # an answer was lost
        (replace(LEASE, adopted=True), Claim("s", "t", "i", 9)),  # of a move that only a former table knew
        (replace(LEASE, owner="j", former_owner="i", former_epoch=4), Claim("s", "t", "i", 4, unreachable=True)),
    ],
)
def test_what_a_claim_may_name(epochs: Epochs, last: Lease | None, claim: Claim) -> None:
    epochs.check(claim, last)


@pytest.mark.parametrize(
    ("last", "claim"),
    [
        (None, Claim("s", "t", "i", 9)),
        (LEASE, Claim("s", "t", "i", 4)),
        (LEASE, Claim("s", "t", "i", 6)),  # never given to it
        (LEASE, Claim("s", "t", "other", 4, recovery=True, serial=1)),
        (LEASE, Claim("s", "t", "i", 4, recovery=True, serial=0)),  # it has been resumed since
        (replace(LEASE, owner="j", former_owner="i", former_epoch=4), Claim("s", "t", "i", 4)),
        (replace(LEASE, owner="j", former_owner="i", former_epoch=4), Claim("s", "t", "k", 4, unreachable=True)),
        (replace(LEASE, owner="j", former_owner="i", former_epoch=4), Claim("s", "t", "i", 3, unreachable=True)),
    ],
)
def test_what_it_may_not(epochs: Epochs, last: Lease | None, claim: Claim) -> None:
    with pytest.raises(EpochConflict):
        epochs.check(claim, last)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.sampled_from(["gives", "ends", "dies"]))))
def test_no_session_is_given_an_epoch_twice(events: list[tuple[str, int, str]]) -> None:
    """By one table or by those after it, as long as an owner names the highest epoch that it was told (it was not told
    that of the `lost` grants after it), and a table younger than its session takes that over from a report."""
    lives, now_s = 1, 0.0
    epochs = Epochs(before=0, remembered_s=REMEMBERED_S)
    told: dict[str, int] = {}
    active: dict[str, Lease] = {}
    everything: set[tuple[str, int]] = set()
    for session, lost, event in events:
        now_s += REMEMBERED_S
        if event == "gives":
            for told_of in [True] + [False] * lost:
                last = active.get(session) or epochs.last_of_ended(session)
                epoch = epochs.next(session, told.get(session, 0), last)
                assert (session, epoch) not in everything
                everything.add((session, epoch))
                epochs.given(session, epoch)
                if told_of:
                    told[session] = epoch
                    active[session] = replace(LEASE, session=session, epoch=epoch)
                    epochs.begun(session)
        elif event == "ends" and session in active:
            epochs.ended(active.pop(session), now_s)
        elif event == "dies":
            lives += 1
            epochs = Epochs(before=lives * 1_000_000, remembered_s=REMEMBERED_S)
            for lease in active.values():
                active[lease.session] = replace(lease, adopted=True)
                epochs.given(lease.session, lease.epoch)
        epochs.expire(now_s)

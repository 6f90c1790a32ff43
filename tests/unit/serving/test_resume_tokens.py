"""Resume tokens say what they were issued for, and missed frames come before new ones."""

from __future__ import annotations

import pytest

from actors.errors import UnknownSession
from actors.messages import FrameOut
from graphs.stages import FrameKey
from serving.resume import NothingToResume, Replay, Ticket, Tickets
from serving.tenants import Tenant
from tests.failover_fakes import TENANT
from tests.fake_replica import SPEC, Model, spoken

OTHER = Tenant("other")


def test_a_token_says_what_it_was_issued_for() -> None:
    tickets = Tickets("secret")
    token = tickets.issue("abc", 3, TENANT)
    assert tickets.read(token, TENANT) == Ticket("abc", 3)
    for wrong in (
        token[:-1],
        token + "A",
        token.replace("abc", "abd"),
        token.replace(".3.", ".4."),
        "a.b.c",
        "..",
        ".1.é",
    ):
        with pytest.raises(NothingToResume):
            tickets.read(wrong, TENANT)
    with pytest.raises(NothingToResume):
        tickets.read(token, OTHER)
    with pytest.raises(NothingToResume):
        Tickets("another secret").read(token, TENANT)


def test_the_error_is_one_of_the_tree() -> None:
    assert issubclass(NothingToResume, UnknownSession)


def frame(number: int) -> FrameOut:
    return Model(SPEC).step(FrameKey("s", 1, number), spoken(number))


def test_new_frames_wait_for_missed_ones_but_not_for_ever() -> None:
    replay = Replay(5, 8)
    assert list(replay.take(frame(8))) == []
    assert [each.key.frame for number in (5, 6, 7) for each in replay.take(frame(number))] == [5, 6, 7, 8]
    replay = Replay(5, 8)
    given = [each.key.frame for number in range(8, 30) for each in replay.take(frame(number))]
    assert given == list(range(8, 30))

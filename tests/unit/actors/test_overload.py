"""A replica stops admitting before anybody is late: the policy alone, by an injected clock."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.overload import FRAME_BUDGET_MS, Overload, OverloadSettings

FRAME_S = 0.08


class Machine:
    """Frames take `fixed` ms and `each` more a conversation, and sometimes a tenth longer."""

    def __init__(self, fixed: float, each: float, seed: int = 1) -> None:
        self.fixed, self.each, self.dice = fixed, each, random.Random(seed)
        self.now_s = 0.0
        self.policy = Overload()
        self.late = 0

    def talk(self, conversations: int, seconds: float) -> None:
        """Frames at their pace, and a report with each sixth."""
        for frame in range(round(seconds / FRAME_S)):
            if frame % 6 == 0:
                self.room(conversations)
            self.now_s += FRAME_S
            took = self.fixed + self.each * conversations
            for _ in range(conversations):
                ms = took * (1.1 if self.dice.random() < 0.05 else 1.0)
                self.late += ms > FRAME_BUDGET_MS
                self.policy.observe(self.now_s, conversations, ms)

    def room(self, conversations: int, free: int = 100) -> int:
        return self.policy.room(self.now_s, conversations, free)


@pytest.mark.parametrize(("fixed", "each"), [(10.0, 2.0), (2.0, 8.0), (40.0, 0.5), (30.0, 30.0)])
def test_callers_are_let_in_until_the_next_would_be_late(fixed: float, each: float) -> None:
    """One at a time, as many as there is room for: nobody is ever late, and little is left unused."""
    machine, talking = Machine(fixed, each), 1
    for _ in range(200):
        machine.talk(talking, 12.0)
        if machine.room(talking) == 0:
            break
        talking += 1
    assert machine.late == 0
    assert machine.room(talking) == 0, "it never closed"
    most = int((FRAME_BUDGET_MS / 1.1 - fixed) / each)
    assert most - 2 <= talking <= most


def test_a_crowd_is_let_in_no_further_than_one_by_one() -> None:
    """Ten come in one report's time: the room that was told covers them, those that are not live yet counted."""
    machine = Machine(10.0, 2.0)
    for talking in (2, 4, 8):
        machine.talk(talking, 24.0)
    room = machine.room(8)
    assert 8 + room <= 32
    assert machine.room(8 + room - 3) == 3
    assert machine.room(8, free=5) == 5
    assert machine.room(8 + room) == 0


def test_late_frames_close_it_at_once_and_it_does_not_flap() -> None:
    machine = Machine(20.0, 2.0)
    for talking in (4, 8):
        machine.talk(talking, 12.0)
    assert machine.room(8) > 0
    machine.fixed = 70.0  # a neighbour on the machine
    machine.talk(8, 0.5)
    assert machine.room(8) == 0
    machine.fixed = 48.0  # p99 of one more: 73 ms, between nine tenths of the budget and the whole
    machine.talk(8, 12.0)
    assert machine.room(8) == 0
    fresh = Machine(48.0, 2.0)
    for talking in (4, 8):
        fresh.talk(talking, 12.0)
    assert fresh.room(8) > 0, "one that had not closed stays open at that"
    machine.fixed = 20.0
    machine.talk(8, 12.0)
    assert machine.room(8) > 0


def test_who_lost_its_line_to_a_death_of_ours_finds_its_place_open_once_and_for_a_while() -> None:
    machine = Machine(70.0, 2.0)
    machine.talk(8, 12.0)
    policy = machine.policy
    assert machine.room(8) == 0
    for _ in range(2):
        policy.owe(machine.now_s)
    assert machine.room(6) == 2
    assert machine.room(6, free=1) == 1
    policy.came()
    assert machine.room(7) == 1
    machine.talk(7, 9.0)
    assert machine.room(7) == 1
    machine.talk(7, 2.0)
    assert machine.room(7) == 0, "it does not come back any more"
    policy.came()  # somebody who was owed nothing
    assert machine.room(8) == 0


def test_what_is_owed_is_not_on_top_of_room() -> None:
    machine = Machine(10.0, 2.0)
    machine.talk(8, 12.0)
    room = machine.room(8)
    machine.policy.owe(machine.now_s)
    assert machine.room(8) == room > 1


def test_without_evidence_slots_are_the_limit() -> None:
    policy = Overload()
    assert policy.room(0.0, 0, 7) == 7
    for frame in range(20):
        policy.observe(frame * FRAME_S, 1, 500.0)
    assert policy.room(2.0, 1, 7) == 7, "twenty frames say nothing of one in a hundred"
    for frame in range(100):
        policy.observe(2.0 + frame * FRAME_S, 1, 500.0)
    assert policy.room(10.0, 1, 7) == 0
    assert policy.room(60.0, 0, 7) == 7, "all of that is long ago"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 400)), min_size=1, max_size=200),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_any_history_gives_a_room(frames: list[tuple[int, float]], conversations: int, free: int) -> None:
    policy = Overload(OverloadSettings(least=1))
    for i, (count, ms) in enumerate(frames):
        policy.observe(i * 0.01, count, ms)
    room = policy.room(len(frames) * 0.01, conversations, free)
    assert 0 <= room <= free
    outlook = policy._outlook(len(frames) * 0.01)
    assert outlook is not None
    if room:
        assert outlook.with_(conversations + room) < FRAME_BUDGET_MS

"""Suspects: one at a time, never two together, refused at their second death."""

from __future__ import annotations

import pytest

from cluster.policy.quarantine import PROBATION_S, Standing, may_rebuild, moves_at_once, on_probation, standing


@pytest.mark.parametrize(
    ("deaths", "expected"),
    [(0, Standing.CLEAR), (1, Standing.SUSPECT), (2, Standing.CONDEMNED), (3, Standing.CONDEMNED)],
)
def test_what_a_conversation_is_by_the_deaths_it_was_present_at(deaths: int, expected: Standing) -> None:
    assert standing(deaths) is expected


def test_probation_begins_when_it_is_live_and_outlasts_its_first_25_frames() -> None:
    assert on_probation(None, 1e9)
    assert on_probation(10.0, 10.0 + 25 * 0.08)
    assert not on_probation(10.0, 10.0 + PROBATION_S)


@pytest.mark.parametrize(
    ("rebuilding", "suspect", "has_suspect", "may"),
    [
        (3, False, False, True),
        (4, False, False, False),
        (0, False, True, True),  # the innocent do not wait for a suspect
        (0, True, True, False),
        (3, True, False, True),
    ],
)
def test_how_many_are_rebuilt_at_once(rebuilding: int, suspect: bool, has_suspect: bool, may: bool) -> None:
    assert may_rebuild(rebuilding, 4, suspect=suspect, has_suspect=has_suspect) is may


def test_the_more_wait_the_more_move_at_once_and_never_more_than_may_be_rebuilt() -> None:
    assert [moves_at_once(waiting, 4) for waiting in (0, 1, 5, 6, 12, 30, 300)] == [1, 1, 1, 2, 3, 4, 4]
    assert moves_at_once(30, 1) == 1

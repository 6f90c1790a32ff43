"""A journal cut into parts arrives whole or not at all, and what never arrives holds no memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import JournalError
from actors.journal_parts import PART_BYTES, PartsBin, cut

BLOB = bytes(range(256)) * (PART_BYTES // 128) + b"and a rest"  # two parts and a piece


@pytest.mark.parametrize("blob", [b"", b"short", BLOB[:PART_BYTES], BLOB])
def test_there_and_back(blob: bytes) -> None:
    held = PartsBin()
    parts = list(cut("s", 1, blob))
    assert all(len(part.data) <= PART_BYTES for part in parts)
    assert [held.add(part, 0.0) for part in parts] == [*[False] * (len(parts) - 1), True]
    assert held.take("s", 1) == blob
    assert (len(held), held.held_bytes) == (0, 0)


def test_parts_of_several_journals_may_be_mixed() -> None:
    held = PartsBin()
    for pair in zip(cut("a", 1, BLOB), cut("b", 2, BLOB[::-1]), strict=True):
        for part in pair:
            held.add(part, 0.0)
    assert (held.take("a", 1), held.take("b", 2)) == (BLOB, BLOB[::-1])


def test_a_journal_may_be_begun_anew() -> None:
    held, parts = PartsBin(), list(cut("s", 1, BLOB))
    held.add(parts[0], 0.0)
    for part in parts:
        held.add(part, 0.0)
    assert held.take("s", 1) == BLOB


@pytest.mark.parametrize("order", [(1,), (0, 2), (0, 1, 1), (0, 1, 2, 2)])
def test_a_missing_or_repeated_part_is_an_error_and_leaves_nothing(order: tuple[int, ...]) -> None:
    held, parts = PartsBin(), list(cut("s", 1, BLOB))
    for index in order[:-1]:
        held.add(parts[index], 0.0)
    with pytest.raises(JournalError, match="out of order"):
        held.add(parts[order[-1]], 0.0)
    assert held.held_bytes == 0
    with pytest.raises(JournalError, match="in full"):
        held.take("s", 1)


def test_parts_that_disagree_on_their_number_are_an_error() -> None:
    held, parts = PartsBin(), list(cut("s", 1, BLOB))
    held.add(parts[0], 0.0)
    with pytest.raises(JournalError, match="out of order"):
        held.add(replace(parts[1], count=9), 0.0)


def test_a_journal_that_is_asked_for_too_early_is_an_error() -> None:
    held, parts = PartsBin(), list(cut("s", 1, BLOB))
    held.add(parts[0], 0.0)
    with pytest.raises(JournalError, match="in full"):
        held.take("s", 1)
    assert held.held_bytes == 0


def test_what_is_held_is_bounded_and_what_was_given_up_makes_room() -> None:
    held = PartsBin(limit_bytes=3 * PART_BYTES, patience_s=30.0)
    for session in ("a", "b"):
        held.add(next(cut(session, 1, BLOB)), 0.0)
    fresh = list(cut("c", 1, BLOB))
    held.add(fresh[0], 20.0)
    with pytest.raises(JournalError, match="room"):
        held.add(fresh[1], 20.0)
    held.add(fresh[0], 20.0)
    assert not held.add(fresh[1], 31.0)  # a and b were begun 31 s ago, and nobody finished them
    assert held.held_bytes == 2 * PART_BYTES
    held.drop("c", 1)
    assert (len(held), held.held_bytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.sampled_from(["add", "drop", "take"]))))
def test_the_count_of_bytes_is_right_whatever_comes(steps: list[tuple[str, int, str]]) -> None:
    held = PartsBin(limit_bytes=4 * PART_BYTES)
    for session, index, action in steps:
        try:
            if action == "add":
                held.add(list(cut(session, 1, BLOB))[index], 0.0)
            elif action == "take":
                assert held.take(session, 1) == BLOB
            else:
                held.drop(session, 1)
        except JournalError:
            continue
    assert 0 <= held.held_bytes <= 4 * PART_BYTES
    for session in "ab":
        held.drop(session, 1)
    assert held.held_bytes == 0

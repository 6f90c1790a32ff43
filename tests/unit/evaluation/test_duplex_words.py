"""Words as they are compared: one spelling, edit distance, and what counts as saying something."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.duplex.words import cardinal, contains, errors, is_murmur, spoken

words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, I'm Ben!", "hello i am ben"),
        ("We can’t, we don't.", "we can not we do not"),
        ("$4.50", "four fifty"),
        ("$6", "six dollars"),
        ("$1", "one dollar"),
        ("8.90 or 890", "eight ninety or eight ninety"),
        ("a hundred and twenty dollars", "one twenty dollars"),
        ("120 dollars", "one twenty dollars"),
        ("a hundred dollars", "one hundred dollars"),
        ("two hundred", "two hundred"),
        ("2,000 people", "two thousand people"),
        ("half past six", "six thirty"),
        ("6:30", "six thirty"),
        ("At 10:00, 9:05", "at ten nine oh five"),
        ("in 1969 and 2005", "in nineteen sixty nine and two thousand five"),
        ("25% of 3.5", "twenty five percent of three point five"),
        ("Uh-huh. Okay. OK.", "uh huh okay okay"),
        ("fish and chips", "fish and chips"),
        ("Dr. Lane", "doctor lane"),
        ("", ""),
    ],
)
def test_one_spelling(text: str, expected: str) -> None:
    assert spoken(text) == expected.split()


@given(st.text())
def test_any_text_has_words_that_stay_as_they_are(text: str) -> None:
    once = spoken(text)
    assert all(word == word.lower() and " " not in word for word in once)
    assert all(not word.isdecimal() for word in once)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "zero"), (15, "fifteen"), (40, "forty"), (101, "one hundred one"), (1_000_000, "one million")],
)
def test_whole_numbers(number: int, expected: str) -> None:
    assert cardinal(number) == expected.split()


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        cardinal(-1)


class TestErrors:
    @pytest.mark.parametrize(
        ("said", "heard", "count"),
        [
            ("a b c", "a b c", 0),
            ("a b c", "a x c", 1),
            ("a b c", "a c", 1),
            ("a b", "x a b y", 2),
            ("a b", "a b c d", 2),
            ("", "a", 1),
            ("a b c", "b c a", 2),
        ],
    )
    def test_by_hand(self, said: str, heard: str, count: int) -> None:
        assert errors(said.split(), heard.split()) == count

    @given(words, words)
    def test_bounds_and_symmetry(self, one: list[str], other: list[str]) -> None:
        count = errors(one, other)
        assert abs(len(one) - len(other)) <= count <= max(len(one), len(other))
        assert count == errors(other, one)
        assert (count == 0) == (one == other)


class TestContains:
    @pytest.mark.parametrize(
        ("heard", "wanted", "does"),
        [
            ("that is $4.50 please", "four fifty", True),
            ("it's 6 dollars", "six dollars", True),
            ("it's six", "six dollars", True),
            ("it's 26 dollars", "six dollars", False),
            ("it's 6.50", "six dollars", False),
            ("eighty dollars", "eight dollars", False),
            ("our cheesecake is good", "cheese cake", True),
            ("my name is Klara", "Clara", True),
            ("my name is Lara", "Clara", True),
            ("my name is Sarah", "Clara", False),
            ("my name is Tim", "Tom", False),
            ("street oak", "Oak Street", False),
            ("", "Tom", False),
            ("anything at all", "", False),
        ],
    )
    def test_by_hand(self, heard: str, wanted: str, does: bool) -> None:
        assert contains(spoken(heard), spoken(wanted)) is does


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("Mm-hmm.", True),
        ("Okay, right.", True),
        ("All right.", True),
        ("I see.", True),
        ("", True),
        ("Yes.", False),
        ("I", False),
    ],
)
def test_murmurs(text: str, is_one: bool) -> None:
    assert is_murmur(spoken(text)) is is_one

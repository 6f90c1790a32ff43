"""What counts as a value of the prompt."""

from __future__ import annotations

import numpy as np

from training.comprehension import Tally, values_in


def test_values_are_found_whole_wherever_they_are() -> None:
    text = [5, 1, 2, 3, 9, 1, 2, 8, 2, 3]
    assert values_in(text, [[1, 2, 3], [9]]).tolist() == [False, True, True, True, True, *[False] * 5]
    assert values_in(text, [[2, 3]]).nonzero()[0].tolist() == [2, 3, 8, 9]
    assert not values_in(text, []).any()
    assert not values_in([1], [[1, 2]]).any(), "half a value is none"


def test_a_tally_adds_up() -> None:
    tally = Tally()
    assert "of 0" in str(tally)
    tally.add(np.array([True, False, True]))
    tally.add(np.array([True]))
    assert (tally.right, tally.of) == (3, 4)
    assert "75% of 4" in str(tally)

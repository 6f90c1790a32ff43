from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chaos.plan import SCENARIOS, Windows, gap_limit_s, kinds, strike_times_s

WINDOWS = Windows(model_s=16.0, codec_s=8.0)


@given(st.integers(0, 10_000), st.floats(40, 120))
def test_strikes_leave_room_and_the_last_comes_after_everything_has_wrapped(seed: int, seconds: float) -> None:
    times = strike_times_s(seconds, seed, WINDOWS)
    assert len(times) == 3
    assert times[0] >= 5
    assert all(after - before >= 9 for before, after in pairwise(times))
    assert 16 < times[-1] <= seconds - 10
    assert times == strike_times_s(seconds, seed, WINDOWS)


def test_other_seeds_strike_at_other_times() -> None:
    assert len({tuple(strike_times_s(60, seed, WINDOWS)) for seed in range(20)}) == 20


@pytest.mark.parametrize(("seconds", "windows"), [(30, WINDOWS), (60, Windows(55, 8)), (60, Windows(8, 55))])
def test_a_run_too_short_says_how_long_it_has_to_be(seconds: float, windows: Windows) -> None:
    with pytest.raises(ValueError, match="take at least"):
        strike_times_s(seconds, 1, windows)


def test_a_move_may_not_be_heard_and_a_death_not_for_long() -> None:
    limits = {scenario: (gap_limit_s(scenario, 8), gap_limit_s(scenario, 3)) for scenario in SCENARIOS}
    planned = {"drain", "scale-down", "deploy"}
    assert limits == {each: (0.2, 0.2) if each in planned else (5.0, 2.0) for each in SCENARIOS}


def test_several_kinds_are_struck_in_turn() -> None:
    assert kinds("engine") == ("engine",)
    assert kinds("engine+drain") == ("engine", "drain")
    assert gap_limit_s("engine+drain", 8) == 5.0
    assert gap_limit_s("deploy+drain", 8) == 0.2
    with pytest.raises(ValueError, match="'rain' is no scenario"):
        kinds("engine+rain")

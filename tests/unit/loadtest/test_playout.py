from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.playout import FRAME_S, PLAYOUT_BUFFER_S, underruns


def test_on_the_beat_nothing_runs_dry() -> None:
    assert underruns([10 + FRAME_S * k for k in range(1_000)]) == []
    assert underruns([]) == []
    assert underruns([3.0]) == []


def test_a_frame_may_be_late_by_the_buffer_and_not_by_more() -> None:
    # Frame 0 plays at 0.12, so frame 1 is needed at 0.20 and frame 2 at 0.28.
    assert underruns([0.0, 0.20, 0.28]) == []
    assert underruns([0.0, 0.201]) == [1]
    assert underruns([0.0, 0.08, 0.281]) == [2]


def test_after_a_gap_the_player_buffers_again() -> None:
    # Frame 1 is 0.3 s late. It plays at 0.5 + 0.12; frame 2 is needed at 0.70, frame 3 at 0.78.
    assert underruns([0.0, 0.5, 0.70, 0.78]) == [1]
    assert underruns([0.0, 0.5, 0.70, 0.79]) == [1, 3]


def test_what_came_early_is_in_hand() -> None:
    # Five frames at once last until 0.12 + 5 x 0.08 = 0.52.
    assert underruns([0.0] * 5 + [0.52]) == []
    assert underruns([0.0] * 5 + [0.53]) == [5]


def test_a_server_that_is_ten_percent_slow_runs_dry_again_and_again() -> None:
    # Each frame comes 8 ms later than the one before: after a start 15 fit into the 120 ms, the 16th does not.
    assert underruns([0.088 * k for k in range(64)]) == [16, 32, 48]


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=60))
def test_more_buffer_is_never_worse_for_the_first_gap(gaps: list[float]) -> None:
    heard = [sum(gaps[: k + 1]) for k in range(len(gaps))]
    small, large = underruns(heard), underruns(heard, 2 * PLAYOUT_BUFFER_S)
    if large:
        assert small
        assert small[0] <= large[0]


@pytest.mark.parametrize("buffer_s", [0.0, 0.04])
def test_the_buffer_is_an_argument(buffer_s: float) -> None:
    assert underruns([0.0, 0.08 + buffer_s], buffer_s) == []
    assert underruns([0.0, 0.081 + buffer_s], buffer_s) == [1]

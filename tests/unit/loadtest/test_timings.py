from __future__ import annotations

import pytest

from loadtest.timings import FRAME_S, OutOfOrder, Timings, percentile


def held(frames: int, beat_s: float, lag_s: float = 0.04) -> Timings:
    """A call opened at 10 s, ready at 11 s, that answers each frame `lag_s` after it was sent."""
    timings = Timings(opened_s=10.0)
    timings.on_ready(11.0)
    for k in range(frames):
        due = 11.0 + beat_s * (k + 1)
        timings.on_sent(due + 0.001, due)
        timings.on_heard(due + 0.001 + lag_s, 1920)
    return timings


def test_a_live_call() -> None:
    timings = held(100, FRAME_S)
    assert timings.time_to_ready_s == pytest.approx(1.0)
    assert timings.time_to_first_audio_s == pytest.approx(1.0 + 0.08 + 0.041)
    assert timings.frame_gaps_ms == pytest.approx([80.0] * 99)
    assert timings.reply_lags_ms == pytest.approx([40.0] * 100)
    assert timings.generator_lags_ms == pytest.approx([1.0] * 100)
    assert timings.real_time_factor == pytest.approx(1.0)
    assert timings.was_real_time


def test_a_server_too_slow_is_not_real_time() -> None:
    timings = held(100, 0.088)
    assert timings.real_time_factor == pytest.approx(1.1)
    assert not timings.was_real_time


def test_a_call_without_audio_has_no_figures_and_was_not_live() -> None:
    timings = Timings(opened_s=0.0)
    assert timings.time_to_ready_s is None
    assert timings.time_to_first_audio_s is None
    assert timings.real_time_factor is None
    assert not timings.was_real_time


def test_a_frame_counts_when_its_last_sample_is_here() -> None:
    timings = Timings(opened_s=0.0)
    timings.on_ready(1.0)
    timings.on_heard(2.0, 960)
    assert timings.heard_s == []
    timings.on_heard(3.0, 960 + 1920 + 5)
    assert timings.heard_s == [3.0, 3.0]


def test_a_silence_in_which_the_call_ends_is_a_gap_and_an_underrun() -> None:
    timings = held(10, FRAME_S)
    last_s = timings.heard_s[-1]
    timings.on_end(last_s + 0.19)
    assert timings.open_gap_ms is None
    assert timings.underruns == 0
    timings.ended_s = last_s + 0.21
    assert timings.open_gap_ms == pytest.approx(210)
    assert timings.underruns == 1


def test_a_call_that_never_heard_anything_was_silent_from_the_start() -> None:
    timings = Timings(opened_s=0.0)
    timings.on_ready(1.0)
    timings.on_end(4.0)
    assert timings.open_gap_ms == pytest.approx(3000)
    assert timings.underruns == 1


def test_a_call_that_was_never_ready_has_no_silence() -> None:
    timings = Timings(opened_s=0.0)
    timings.on_end(4.0)
    assert timings.open_gap_ms is None
    assert timings.underruns == 0


def test_events_out_of_order_are_refused() -> None:
    timings = Timings(opened_s=5.0)
    with pytest.raises(OutOfOrder, match="before it was ready"):
        timings.on_heard(6.0, 1920)
    with pytest.raises(OutOfOrder, match="before the server was ready"):
        timings.on_sent(6.0, 6.0)
    with pytest.raises(OutOfOrder, match="clock went back"):
        timings.on_ready(4.0)
    timings.on_ready(6.0)
    with pytest.raises(OutOfOrder, match="twice"):
        timings.on_ready(7.0)
    timings.on_end(8.0)
    with pytest.raises(OutOfOrder, match="ended twice"):
        timings.on_end(9.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 5), (0.9, 9), (0.95, 10), (0.99, 10), (1.0, 10)])
def test_percentiles_are_values_that_occurred(share: float, value: int) -> None:
    assert percentile([3, 1, 2, 10, 9, 8, 7, 6, 5, 4], share) == value


def test_no_values_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)

"""Who speaks when: gaps, pauses, cut turns and murmurs, on utterances made by hand."""

from __future__ import annotations

import pytest

from tests.unit.training.hand_made import spoken
from training.kokoro import RATE
from training.script import Script, Turn
from training.timeline import TAIL_S, Placed, agent_words, lay_out


def timeline(*turns: Turn) -> list[Placed]:
    made = lay_out(Script(0, "train", "cafe", "", "A", "U", "X", "", turns, ()), spoken)
    assert made.samples == max(item.stop for item in made.placed) + round(TAIL_S * RATE)
    return list(made.placed)


def times(item: Placed) -> tuple[float, float]:
    return item.start / RATE, item.stop / RATE


class TestTurns:
    def test_gaps_count_from_the_end_before(self) -> None:
        first, second = timeline(Turn("agent", ("one two",), gap_s=0.5), Turn("user", ("three",), gap_s=0.25))
        assert times(first) == (0.5, 2.5)
        assert times(second) == (2.75, 3.75)
        assert [(w.text, w.start_s) for w in first.words] == [("one", 0.5), ("two", 1.5)]

    def test_a_negative_gap_overlaps(self) -> None:
        _, second = timeline(Turn("agent", ("one two",), gap_s=0.0), Turn("user", ("three",), gap_s=-0.5))
        assert times(second) == (1.5, 2.5)

    def test_a_pause_stands_between_parts(self) -> None:
        first, second = timeline(Turn("user", ("one", "two"), (0.75,), gap_s=0.0))
        assert times(first) == (0.0, 1.0)
        assert times(second) == (1.75, 2.75)

    def test_voices_go_with_speakers(self) -> None:
        placed = timeline(Turn("agent", ("a",)), Turn("user", ("b",)), Turn("aside", ("c",), kind="aside"))
        assert [item.voice for item in placed] == ["A", "U", "X"]


class TestInterruptions:
    def test_the_agent_stops_at_the_word_that_sounds(self) -> None:
        agent, user = timeline(
            Turn("agent", ("one two three four",), gap_s=0.0),
            Turn("user", ("wait",), kind="interruption", at=0.5, yield_s=0.3),
        )
        assert times(user) == (2.0, 3.0)
        # "three" begins at 2.0 and would last until 2.9; the voice stops 0.06 s after the yield time.
        assert [w.text for w in agent.words] == ["one", "two", "three"]
        assert times(agent) == pytest.approx((0.0, 2.36))
        assert agent.words[-1].end_s == pytest.approx(2.36)

    def test_parts_not_begun_are_never_said(self) -> None:
        placed = timeline(
            Turn("agent", ("one two", "three"), (1.0,), gap_s=0.0),
            Turn("user", ("wait",), kind="interruption", at=0.25, yield_s=0.2),
        )
        assert [item.text for item in placed] == ["one two", "wait"]

    def test_what_follows_waits_for_both(self) -> None:
        placed = timeline(
            Turn("agent", ("one two three four",), gap_s=0.0),
            Turn("user", ("wait",), kind="interruption", at=0.5, yield_s=0.3),
            Turn("agent", ("yes",), gap_s=0.5),
        )
        assert times(placed[-1]) == (3.5, 4.5)

    def test_a_murmur_into_what_was_cut_off_is_gone(self) -> None:
        placed = timeline(
            Turn("agent", ("one two three four",), gap_s=0.0),
            Turn("user", ("mhm",), kind="backchannel", at=0.9),
            Turn("user", ("wait",), kind="interruption", at=0.25, yield_s=0.2),
        )
        assert [item.text for item in placed] == ["one two three four", "wait"]


class TestBackchannels:
    def test_do_not_move_the_floor(self) -> None:
        placed = timeline(
            Turn("agent", ("one two three four",), gap_s=0.0),
            Turn("user", ("mhm",), kind="backchannel", at=0.5),
            Turn("user", ("five",), gap_s=0.5),
        )
        assert [times(item) for item in placed] == [(0.0, 4.0), (2.0, 3.0), (4.5, 5.5)]

    def test_come_in_a_pause_where_there_is_one(self) -> None:
        placed = timeline(
            Turn("user", ("one two", "three four"), (1.5,), gap_s=0.0),
            Turn("agent", ("mhm",), kind="backchannel", at=0.3),
        )
        assert times(placed[1]) == (2.15, 3.15)


class TestAgentWords:
    def test_are_in_order_of_time_and_the_agents_alone(self) -> None:
        script = Script(
            0, "train", "cafe", "", "A", "U", "X", "",
            (
                Turn("user", ("one two", "three"), (1.5,), gap_s=0.0),
                Turn("agent", ("mhm",), kind="backchannel", at=0.3),
                Turn("agent", ("four five",), gap_s=0.5),
            ),
            (),
        )  # fmt: skip
        assert [word.text for word in agent_words(lay_out(script, spoken))] == ["mhm", "four", "five"]

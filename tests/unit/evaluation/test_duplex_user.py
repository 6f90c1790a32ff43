"""The scripted user, frame by frame: when it speaks, what it leaves out, and when it hangs up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from evaluation.duplex.items import Cue, Line
from evaluation.duplex.user import (
    FRAME_S,
    FRAME_SAMPLES,
    LONGEST_S,
    RATE,
    Samples,
    ScriptedUser,
    Spoken,
    say,
    speech_spans,
)
from tests.unit.evaluation.duplex_items import SECOND, item, piece, speech, tone, turn

FIRST = Cue("user", 0.8)


def play(user: ScriptedUser, agent: Callable[[float], bool], most_s: float = 90.0) -> Samples:
    """Runs a conversation to its end: `agent` says whether the agent sounds at a time. Returns the microphone."""
    frames: list[Samples] = []
    while not user.done:
        assert user.now_s < most_s, "the user never hangs up"
        sounds = agent(user.now_s)
        frames.append(user.frame())
        user.hear(tone(FRAME_SAMPLES) if sounds else np.zeros(FRAME_SAMPLES, dtype=np.float32))
    return np.concatenate(frames)


def log(user: ScriptedUser) -> list[tuple[int, str, float]]:
    return [(entry.line, entry.outcome, pytest.approx(entry.at_s, abs=1e-6)) for entry in user.log]


def between(*spans: tuple[float, float]) -> Callable[[float], bool]:
    return lambda now_s: any(start_s <= now_s < end_s for start_s, end_s in spans)


class TestCues:
    def test_after_a_time(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST)), speech())
        sound = play(user, between())
        assert log(user) == [(0, "said", 0.8)]
        heard = np.abs(sound) > 0.01
        assert not heard[: 10 * FRAME_SAMPLES].any()
        assert heard[10 * FRAME_SAMPLES : 22 * FRAME_SAMPLES].mean() > 0.9
        assert not heard[22 * FRAME_SAMPLES :].any()

    def test_after_the_agents_answer(self) -> None:
        # The first line ends at 1.76 s; the agent answers from 2.4 to 4.0 s.
        user = ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8))), speech())
        play(user, between((2.4, 4.0)))
        assert user.log[1].at_s == pytest.approx(4.8, abs=FRAME_S)

    def test_an_agent_that_says_nothing_is_waited_for_with_patience(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8, patience_s=2.0))), speech())
        play(user, between())
        assert user.log[1].at_s == pytest.approx(1.76 + 2.0, abs=FRAME_S)

    def test_one_that_does_not_stop_is_spoken_over(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8))), speech())
        play(user, lambda now_s: True)
        assert user.log[1].at_s == pytest.approx(1.76 + LONGEST_S, abs=FRAME_S)

    def test_what_the_agent_says_before_the_users_end_is_no_answer(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8, patience_s=3.0))), speech())
        play(user, between((0.5, 1.7)))
        assert user.log[1].at_s == pytest.approx(1.76 + 3.0, abs=FRAME_S)

    def test_a_click_is_no_answer(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8, patience_s=3.0))), speech())
        play(user, between((2.0, 2.1)))
        assert user.log[1].at_s == pytest.approx(1.76 + 3.0, abs=FRAME_S)


class TestInterrupting:
    INTERRUPTION = Line("interruption", Cue("agent_speaks", 1.2, patience_s=3.0), (piece(1, "wait"),))

    def user(self) -> ScriptedUser:
        return ScriptedUser(item(turn(0, FIRST), self.INTERRUPTION, turn(2, Cue("agent", 0.4, 0.6))), speech())

    def test_when_the_agent_has_spoken_so_long(self) -> None:
        user = self.user()
        play(user, between((2.4, 8.0)))
        assert (user.log[1].outcome, user.log[1].at_s) == ("said", pytest.approx(2.4 + 1.2, abs=2 * FRAME_S))

    def test_breaths_do_not_count(self) -> None:
        user = self.user()
        play(user, between((2.4, 3.0), (3.4, 8.0)))
        assert user.log[1].at_s == pytest.approx(2.4 + 0.4 + 1.2, abs=3 * FRAME_S)

    def test_not_when_the_agent_is_done_before(self) -> None:
        user = self.user()
        play(user, between((2.4, 3.2)))
        assert user.log[1].outcome == "agent finished"
        assert user.log[2].outcome == "said"

    def test_nor_when_it_never_speaks(self) -> None:
        user = self.user()
        play(user, between())
        assert (user.log[1].outcome, user.log[1].at_s) == ("agent silent", pytest.approx(1.76 + 3.0, abs=FRAME_S))

    def test_a_murmur_does_not_begin_a_new_answer(self) -> None:
        murmur = Line("backchannel", Cue("agent_speaks", 0.6), (piece(1, "mhm"),))
        user = ScriptedUser(item(turn(0, FIRST), murmur, turn(2, Cue("agent", 0.8))), speech())
        # The agent ends while the user murmurs; its answer is over all the same.
        play(user, between((2.4, 3.6)))
        assert user.log[2].at_s == pytest.approx(4.4, abs=3 * FRAME_S)


class TestSaying:
    LINE = Line("turn", FIRST, (piece(0, "one"), piece(1, "two")), (0.5,))

    def test_pauses_are_silent(self) -> None:
        sound = say(self.LINE, speech())
        assert len(sound) == 2 * SECOND + RATE // 2
        assert not sound[SECOND : SECOND + RATE // 2].any()
        assert np.abs(sound[:SECOND]).max() > 0.2

    def test_the_spans_are_those_of_the_speech(self) -> None:
        assert speech_spans(self.LINE, 10.0) == [
            pytest.approx((10.02, 10.9)),
            pytest.approx((10.0 + 0.96 + 0.5 + 0.02, 10.0 + 0.96 + 0.5 + 0.9)),
        ]

    def test_noise_lies_under_everything_and_is_looped(self) -> None:
        noise = np.linspace(0.001, 0.002, RATE, dtype=np.float32)
        user = ScriptedUser(item(turn(0, FIRST)), speech(), noise)
        sound = play(user, between())
        assert sound[: 10 * FRAME_SAMPLES] == pytest.approx(noise[: 10 * FRAME_SAMPLES])
        later = np.arange(2 * RATE, 2 * RATE + 100)
        assert sound[later] == pytest.approx(noise[later % RATE])

    def test_the_user_hangs_up_when_everything_is_answered(self) -> None:
        user = ScriptedUser(item(turn(0, FIRST)), speech())
        play(user, between((2.4, 4.0)))
        assert user.now_s == pytest.approx(4.0 + 1.5, abs=3 * FRAME_S)

    def test_a_piece_outside_of_the_sound_is_refused(self) -> None:
        with pytest.raises(ValueError, match="outside"):
            ScriptedUser(item(turn(4, FIRST)), speech(4))

    def test_the_same_agent_hears_the_same_user(self) -> None:
        agent = between((2.4, 8.0))
        users = [ScriptedUser(item(turn(0, FIRST), turn(1, Cue("agent", 0.8))), speech()) for _ in range(2)]
        one, other = (play(user, agent) for user in users)
        assert np.array_equal(one, other)
        assert users[0].log == users[1].log == [Spoken(0, "said", 0.8), users[0].log[1]]

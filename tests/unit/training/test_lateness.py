"""Moments missed: what is late, what of it is learnt, and who breaks in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.config import FRAME_SAMPLES
from tests.unit.training.hand_made import spoken
from training.kokoro import RATE
from training.lateness import missed, waits
from training.plans import PLANS
from training.script import Plan, Script, Turn, write_script
from training.timeline import Placed, Timeline, lay_out


def dialogue(*turns: Turn) -> Script:
    return Script(0, "train", "cafe", "", "A", "U", "X", "", turns, ())


def laid(timeline: Timeline) -> dict[Placed, tuple[int, int]]:
    agent = [item for item in timeline.placed if item.speaker == "agent"]
    return {item: (item.start // FRAME_SAMPLES, -(-item.stop // FRAME_SAMPLES)) for item in agent}


def spans(*turns: Turn) -> list[tuple[int, int]]:
    timeline = lay_out(dialogue(*turns), spoken)
    return waits(timeline, laid(timeline))


ASKS, ANSWERS = Turn("user", ("one two",), gap_s=0.0), ("three four",)
LONG = Turn("agent", ("a b c d e f g h",), gap_s=0.4)
MURMUR = Turn("user", ("mhm",), kind="backchannel", at=0.5)


def floor(script: Script) -> list[Turn]:
    """All but what may be left out: what the user murmurs, and what nobody answers."""
    found = [turn for turn in script.turns if (turn.speaker, turn.kind) != ("user", "backchannel")]
    after = [*(turn.speaker for turn in script.turns[1:]), "user"]
    idle = [
        t for t, speaker in zip(script.turns, after, strict=True) if t.speaker == speaker == "user" and t.kind == "turn"
    ]
    return [turn for turn in found if turn not in idle]


def said(script: Script) -> list[tuple[str, tuple[str, ...]]]:
    return [(turn.speaker, turn.parts) for turn in floor(script)]


class TestWhatIsNotLearnt:
    def test_an_answer_in_time_is_learnt_whole(self) -> None:
        assert spans(ASKS, Turn("agent", ANSWERS, gap_s=0.36)) == []

    def test_of_a_late_one_the_wait_is_not_but_that_it_begins_is(self) -> None:
        # The question ends at 2.0 s, frame 25; the answer begins at 4.0 s, frame 50, announced in frame 49.
        assert spans(ASKS, Turn("agent", ANSWERS, gap_s=2.0)) == [(27, 49)]

    def test_nobody_waits_who_was_not_asked(self) -> None:
        aside = Turn("user", ("one",), gap_s=0.0, kind="aside")
        assert spans(Turn("agent", ANSWERS, gap_s=3.0)) == []
        assert spans(aside, Turn("agent", ANSWERS, gap_s=3.0)) == []
        assert spans(Turn("agent", ("a",)), Turn("agent", ANSWERS, gap_s=3.0)) == []

    def test_a_murmur_is_no_question(self) -> None:
        murmur = Turn("user", ("mhm",), kind="backchannel", at=0.5)
        assert spans(Turn("agent", ("a b c",)), murmur, Turn("agent", ANSWERS, gap_s=3.0)) == []

    def test_of_a_late_yield_talking_on_is_not_but_that_it_ends_is(self) -> None:
        def broke_in(yield_s: float) -> Turn:
            return Turn("user", ("wait",), kind="interruption", at=0.5, yield_s=yield_s)

        talk = Turn("agent", ("a b c d",), gap_s=0.0)
        assert spans(talk, broke_in(0.16)) == []
        [(first, stop)] = spans(talk, broke_in(1.04))
        # Here the voice had ended with "b", before the user began, and would have gone on with "c".
        assert spans(talk, replace(broke_in(0.02), at=0.48)) == []
        # Broken into at 2.0 s, frame 25; "d" begins at 3.0, and the voice stops 0.06 s behind the yield.
        assert (first, stop) == (27, -(-round(3.1 * RATE) // FRAME_SAMPLES))


class TestWhatIsMissed:
    @pytest.fixture(scope="class")
    def scripts(self) -> list[tuple[Script, Script]]:
        plan = Plan(user_voices=10)
        written = [write_script(plan, "train", index) for index in range(200)]
        return [(script, missed(script, np.random.default_rng([1, script.index]))) for script in written]

    def test_everybody_says_what_they_said(self, scripts: list[tuple[Script, Script]]) -> None:
        for before, after in scripts:
            assert said(before) == said(after)

    def test_some_answers_come_late_and_some_users_break_in(self, scripts: list[tuple[Script, Script]]) -> None:
        pairs = [pair for before, after in scripts for pair in zip(floor(before), floor(after), strict=True)]
        late = [b for a, b in pairs if b.speaker == "agent" and b.kind == "turn" and b.gap_s != a.gap_s]
        broken = [(a, b) for a, b in pairs if a.kind == "turn" and b.kind == "interruption"]
        slow = [b for a, b in pairs if a.kind == "interruption" and b.yield_s != a.yield_s]
        answers = [a for a, _ in pairs if a.speaker == "agent" and a.kind == "turn"]
        assert 0.2 < len(late) / len(answers) < 0.4
        assert all(0.5 <= turn.gap_s <= 4.0 for turn in late)
        assert len(broken) > 20
        assert all(b.speaker == "user" for _, b in broken)
        assert slow
        assert all(turn.yield_s >= 0.3 for turn in slow)

    def test_some_murmurs_stay(self, scripts: list[tuple[Script, Script]]) -> None:
        def murmurs(script: Script) -> int:
            return sum((turn.speaker, turn.kind) == ("user", "backchannel") for turn in script.turns)

        were = sum(murmurs(before) for before, _ in scripts)
        are = sum(murmurs(after) for _, after in scripts)
        assert 0.25 < are / were < 0.55

    def test_everybody_is_answered(self) -> None:
        thanks = Turn("user", ("thanks",), gap_s=0.3)
        made = missed(dialogue(ASKS, LONG, thanks, ASKS), np.random.default_rng(0))
        assert [turn.parts for turn in made.turns] == [ASKS.parts, LONG.parts]
        wait = Turn("user", ("wait",), kind="interruption", at=0.5)
        answer = Turn("agent", ("a",))
        made = missed(dialogue(LONG, wait, ASKS, answer), np.random.default_rng(0))
        assert [turn.parts for turn in made.turns] == [LONG.parts, wait.parts, ASKS.parts, answer.parts]

    def test_who_breaks_in_does_so_into_something_long(self) -> None:
        for seed in range(40):
            short = missed(dialogue(Turn("agent", ("a b",)), ASKS, LONG), np.random.default_rng(seed))
            assert short.turns[1] == ASKS
            murmured = missed(dialogue(LONG, MURMUR, ASKS, LONG), np.random.default_rng(seed)).turns
            assert MURMUR not in murmured or murmured[2] == ASKS
        kinds = {missed(dialogue(LONG, ASKS, LONG), np.random.default_rng(seed)).turns[1].kind for seed in range(40)}
        assert kinds == {"turn", "interruption"}

    def test_every_script_of_a_plan_can_be_laid_out(self, scripts: list[tuple[Script, Script]]) -> None:
        assert not PLANS["first"].readings
        for _, script in scripts:
            timeline = lay_out(script, spoken)
            frames = -(-timeline.samples // FRAME_SAMPLES)
            for first, stop in waits(timeline, laid(timeline)):
                assert 0 <= first < stop <= frames

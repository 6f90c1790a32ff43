"""From a training script to an item: what the user says, what it waits for, and what is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from evaluation.duplex.items import USER_AUDIO, Cue, Line, read_item
from evaluation.duplex.recording import CONVERSATION, read_recording
from evaluation.duplex.user import speech_spans
from training.evaluation_items import lines_of, script_indices, write_conversation, write_item
from training.kokoro import RATE, Utterance, Word
from training.script import Fact, Script, Turn

TAIL = RATE // 10  # silence around each utterance


def spoken(voice: str, text: str) -> Utterance:
    """Half a second of tone for each word, a tenth of silence before and after."""
    words = text.split()
    sound = np.zeros(2 * TAIL + len(words) * RATE // 2, dtype=np.int16)
    sound[TAIL:-TAIL] = 8_000
    times = tuple(Word(word, 0.1 + 0.5 * n, 0.6 + 0.5 * n) for n, word in enumerate(words))
    return Utterance(sound, times)


def script(*turns: Turn, facts: tuple[Fact, ...] = ()) -> Script:
    return Script(12, "held_out", "cafe", "You work for A.", "af_river", "U", "X", "Hello.", turns, facts)


def lines(*turns: Turn, facts: tuple[Fact, ...] = ()) -> list[Line]:
    return list(lines_of(script(*turns, facts=facts), spoken)[0])


GREETING = Turn("agent", ("Hello there.",), gap_s=0.5)
ANSWER = Turn("agent", ("It is four fifty and it is very good indeed.",))
QUESTION = Turn("user", ("How much", "is it?"), (0.9,), gap_s=0.6)
WAIT = Turn("user", ("Wait.",), kind="interruption", at=0.5, yield_s=0.3)
FACT = Fact("How much is it?", "It is four fifty.", ("four fifty",))


class TestCues:
    def test_the_agent_greets_first_or_the_user_loses_patience(self) -> None:
        [line] = lines(GREETING, QUESTION, ANSWER)
        assert line.cue == Cue("agent", 0.8, 4.0)

    def test_a_user_who_opens_still_listens_first(self) -> None:
        [line] = lines(Turn("user", ("Hello.",), gap_s=1.7), GREETING)
        assert line.cue == Cue("agent", 0.8, 1.7)

    @pytest.mark.parametrize(("at", "wait_s"), [(0.5, 1.92), (0.01, 0.8), (0.99, 3.0)])
    def test_an_interruption_comes_into_the_answer(self, at: float, wait_s: float) -> None:
        wait = Turn("user", ("Wait.",), kind="interruption", at=at, yield_s=0.3)
        # Ten words are 3.85 s by the scripts' reckoning.
        line = lines(QUESTION, ANSWER, wait)[1]
        assert (line.kind, line.cue.after) == ("interruption", "agent_speaks")
        assert line.cue.wait_s == pytest.approx(wait_s, abs=0.01)

    def test_what_comes_after_it_waits_for_an_answer_that_may_come(self) -> None:
        line = lines(QUESTION, ANSWER, WAIT, Turn("user", ("Do you sell tea?",), gap_s=1.1), ANSWER)[2]
        assert line.cue == Cue("agent", 0.4, 1.1)

    def test_a_murmur_comes_into_the_answer_as_well(self) -> None:
        murmur = Turn("user", ("Mhm.",), kind="backchannel", at=0.4)
        line = lines(QUESTION, ANSWER, murmur)[1]
        assert (line.cue.after, line.answer) == ("agent_speaks", False)

    def test_after_an_aside_the_user_comes_back_alone(self) -> None:
        aside = Turn("user", ("Not now.",), gap_s=1.0, kind="aside")
        [first, second] = lines(aside, Turn("user", ("Sorry.",), gap_s=1.4), Turn("agent", ("No problem.",)))
        assert (first.kind, first.answer) == ("aside", False)
        assert second.cue == Cue("user", 1.4)


class TestAnswers:
    def test_are_wanted_where_the_script_has_one(self) -> None:
        [question, bye] = lines(QUESTION, ANSWER, Turn("user", ("Bye.",)))
        assert (question.answer, question.script) == (True, ANSWER.parts[0])
        assert not bye.answer

    def test_somebody_elses_words_and_murmurs_do_not_come_between(self) -> None:
        others = Turn("aside", ("The keys are in the kitchen.",), kind="aside")
        murmur = Turn("agent", ("Mhm.",), kind="backchannel", at=0.5)
        [question] = lines(QUESTION, murmur, others, ANSWER)
        assert question.answer

    def test_sure_to_an_interrupter_may_be_left_out(self) -> None:
        assert not lines(QUESTION, ANSWER, WAIT, Turn("agent", ("Sure.",)))[1].answer


class TestFacts:
    def test_are_expected_after_their_question(self) -> None:
        [question, other] = lines(QUESTION, ANSWER, Turn("user", ("Thanks.",)), ANSWER, facts=(FACT,))
        assert (question.asks, question.expected, question.unjudged) == (True, ("four fifty",), "")
        assert not other.asks

    def test_not_where_the_user_breaks_into_the_answer(self) -> None:
        question = lines(QUESTION, ANSWER, WAIT, facts=(FACT,))[0]
        assert (question.asks, question.expected) == (True, ())
        assert "interrupted" in question.unjudged

    def test_nor_where_the_prompt_does_not_have_it(self) -> None:
        [question] = lines(QUESTION, ANSWER, facts=(Fact(FACT.question, "We have none.", ()),))
        assert (question.asks, question.expected) == (True, ())
        assert "does not have" in question.unjudged


class TestFiles:
    SCRIPT = script(GREETING, QUESTION, ANSWER, WAIT, Turn("user", ("Do you sell tea?",)), ANSWER, facts=(FACT,))

    def test_pieces_lie_in_the_sound_where_the_item_says(self, tmp_path: Path) -> None:
        write_item(tmp_path / "a", self.SCRIPT, spoken, seed=5)
        made = read_item(tmp_path / "a")
        sound, _ = soundfile.read(tmp_path / "a" / USER_AUDIO)
        pieces = [piece for line in made.lines for piece in line.pieces]
        assert [piece.text for piece in pieces] == ["How much", "is it?", "Wait.", "Do you sell tea?"]
        assert pieces[-1].stop == len(sound)
        for piece in pieces:
            assert piece.speech_s == (pytest.approx(0.1), pytest.approx((piece.stop - piece.start) / RATE - 0.1))
            assert np.abs(sound[piece.start + TAIL : piece.stop - TAIL]).min() > 0

    def test_the_voice_is_the_checkpoints_name_for_it(self, tmp_path: Path) -> None:
        write_item(tmp_path / "a", self.SCRIPT, spoken, seed=5)
        assert read_item(tmp_path / "a").voice == "NATF0"

    def test_a_seed_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_item(tmp_path / name / "item", self.SCRIPT, spoken, seed=5)
        one, other = ({path.name: path.read_bytes() for path in (tmp_path / n / "item").iterdir()} for n in ("a", "b"))
        assert one == other

    def test_the_script_can_stand_for_the_conversation(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        write_item(folder, self.SCRIPT, spoken, seed=5)
        write_conversation(folder, self.SCRIPT, spoken)
        made, recording = read_item(folder), read_recording(folder)
        assert [entry.outcome for entry in recording.spoken] == ["said"] * 3
        assert "".join(text for _, text in recording.text).split()[:2] == ["Hello", "there."]
        sound, _ = soundfile.read(folder / CONVERSATION)
        for line, entry in zip(made.lines, recording.spoken, strict=True):
            for start_s, end_s in speech_spans(line, entry.at_s):
                assert np.abs(sound[round(start_s * RATE) + 10 : round(end_s * RATE) - 600, 0]).min() > 0.1


class TestWhichDialogues:
    def test_all_instances_come_before_any_comes_twice(self) -> None:
        assert script_indices(14, 0) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 1, 5]

    def test_as_many_as_wanted_and_none_twice(self) -> None:
        indices = script_indices(120, 0)
        assert len(set(indices)) == 120

    def test_another_seed_has_others(self) -> None:
        assert not set(script_indices(48, 0)) & set(script_indices(48, 1))

    def test_more_items_keep_the_first(self) -> None:
        assert script_indices(60, 3)[:24] == script_indices(24, 3)

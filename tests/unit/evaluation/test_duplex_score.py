"""The scorer, on dialogues made by hand whose right scores were counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evaluation.duplex.dialogue import Dialogue, Span, Unspoken, UserTurn
from evaluation.duplex.gates import OWN_GATES, judge, wilson
from evaluation.duplex.score import Outcome, Score, score
from tests.unit.evaluation.hand_made import (
    ASKS,
    LAST,
    PRICE,
    USER,
    WAIT,
    dialogue,
    events,
    filibuster,
    interrupter,
    perfect,
    said,
    silence,
)

Outcomes = tuple[list[Outcome], list[Outcome], list[Outcome], list[Outcome], list[Outcome]]


def outcomes(made: Dialogue) -> Outcomes:
    """Of turns, yields, pauses, facts and voice."""
    result = score(made)
    return (
        result.outcomes("turns"),
        result.outcomes("yields"),
        result.outcomes("pauses"),
        result.outcomes("facts"),
        result.outcomes("voice"),
    )


class TestWholeAgents:
    def test_a_perfect_listener_meets_everything(self) -> None:
        assert outcomes(perfect()) == (["met"] * 3, ["met"], ["met"], ["met"], ["met"])

    def test_its_delays_are_those_of_the_dialogue(self) -> None:
        result = score(perfect())
        assert [event.delay_s for event in events(result, "turns")] == pytest.approx([0.3, 0.3, 0.4])
        assert [event.delay_s for event in events(result, "yields")] == pytest.approx([0.3])

    def test_it_passes_every_gate(self) -> None:
        results = judge([score(perfect())])
        assert [result.share for result in results] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
        assert all(result.passed for result in results)

    def test_an_interrupter_takes_no_turn_and_waits_through_no_pause(self) -> None:
        # It is the one that speaks at 12.0 s, and stops at 12.4: even an interrupter may yield.
        assert outcomes(interrupter()) == (["missed"] * 3, ["met"], ["missed"], ["missed"], ["met"])

    def test_one_that_never_yields_takes_no_turn_either(self) -> None:
        assert outcomes(filibuster()) == (["missed"] * 3, ["missed"], ["missed"], ["met"], ["met"])

    def test_silence_waits_and_does_nothing_else(self) -> None:
        assert outcomes(silence()) == (["missed"] * 3, ["missed"], ["met"], ["missed"], ["missed"])

    def test_silence_has_no_word_error_rate_and_so_does_not_pass(self) -> None:
        rate = judge([score(silence())])[0]
        assert (rate.share, rate.n, rate.void, rate.passed) == (None, 0, 1, False)

    def test_all_four_together(self) -> None:
        results = judge([score(made) for made in (perfect(), interrupter(), filibuster(), silence())])
        assert [(result.n, result.share) for result in results[1:]] == [
            (12, pytest.approx(3 / 12)),  # turns
            (4, pytest.approx(2 / 4)),  # yields
            (4, pytest.approx(2 / 4)),  # facts
            (4, pytest.approx(2 / 4)),  # pauses
            (4, pytest.approx(3 / 4)),  # voice
        ]


def turns(*speech: tuple[float, float], words: str = "it opens at nine o'clock every day") -> Score:
    """Of an agent that speaks so around one question, which ends at 4.0 s."""
    spoken_at = said(*((start_s, words) for start_s, _ in speech))
    return score(dialogue(speech, spoken_at, turns=[ASKS]))


class TestTakingTurns:
    @pytest.mark.parametrize(
        ("start_s", "outcome"), [(3.4, "missed"), (3.5, "met"), (4.0, "met"), (5.0, "met"), (5.01, "missed")]
    )
    def test_from_half_a_second_before_to_one_after(self, start_s: float, outcome: str) -> None:
        assert turns((start_s, 7.0)).outcomes("turns") == [outcome]

    def test_who_begins_early_must_outlast_the_user(self) -> None:
        assert turns((3.6, 3.95)).outcomes("turns") == ["missed"]

    def test_early_is_a_negative_delay(self) -> None:
        assert events(turns((3.7, 7.0)), "turns")[0].delay_s == pytest.approx(-0.3)

    def test_a_murmur_is_no_turn(self) -> None:
        assert turns((4.2, 4.8), words="uh huh").outcomes("turns") == ["missed"]

    def test_a_short_answer_is_one(self) -> None:
        assert turns((4.2, 4.6), words="yes").outcomes("turns") == ["met"]

    def test_a_murmur_before_the_answer_does_not_spoil_it(self) -> None:
        made = dialogue([(4.1, 4.5), (4.9, 7.0)], said((4.1, "mhm"), (4.9, "we open at nine")), turns=[ASKS])
        assert events(score(made), "turns")[0].delay_s == pytest.approx(0.9)

    def test_a_late_answer_says_how_late(self) -> None:
        [event] = events(turns((6.5, 8.0)), "turns")
        assert (event.outcome, event.delay_s) == ("missed", pytest.approx(2.5))

    def test_who_was_speaking_and_begins_anew_has_taken_it(self) -> None:
        assert turns((2.5, 4.2), (4.6, 7.0)).outcomes("turns") == ["met"]

    def test_a_breath_does_not_make_a_new_beginning(self) -> None:
        assert turns((2.5, 4.2), (4.45, 7.0)).outcomes("turns") == ["missed"]

    def test_where_no_answer_is_wanted_none_is_counted(self) -> None:
        made = dialogue([(13.0, 14.0)], turns=[WAIT, UserTurn("aside", (Span(16, 17),), "shut the door")])
        assert score(made).outcomes("turns") == []


class TestYielding:
    @pytest.mark.parametrize(("end_s", "outcome"), [(12.05, "met"), (12.6, "met"), (12.61, "missed"), (16.0, "missed")])
    def test_within_six_hundred_milliseconds(self, end_s: float, outcome: str) -> None:
        assert score(dialogue([(10.0, end_s)], turns=[WAIT])).outcomes("yields") == [outcome]

    def test_a_breath_is_no_silence(self) -> None:
        assert score(dialogue([(10.0, 12.3), (12.5, 14.0)], turns=[WAIT])).outcomes("yields") == ["missed"]

    def test_going_on_over_the_user_is_not_yielding(self) -> None:
        long = UserTurn("interruption", (Span(12.0, 14.0),), "no no please stop")
        made = dialogue([(10.0, 12.2), (12.9, 15.0)], said((12.9, "but as I said")), turns=[long])
        assert score(made).outcomes("yields") == ["missed"]

    def test_an_answer_to_it_may_come_early(self) -> None:
        made = dialogue([(10.0, 12.2), (12.6, 14.0)], said((12.6, "of course go ahead")), turns=[WAIT])
        assert score(made).outcomes("yields") == ["met"]

    def test_between_two_breaths_it_is_speaking(self) -> None:
        assert score(dialogue([(10.0, 11.9), (12.1, 15.0)], turns=[WAIT])).outcomes("yields") == ["missed"]

    def test_who_has_just_ended_cannot_be_interrupted(self) -> None:
        assert score(dialogue([(10.0, 11.6)], turns=[WAIT])).outcomes("yields") == ["void"]

    @pytest.mark.parametrize(("why", "outcome"), [("agent silent", "missed"), ("agent finished", "void")])
    def test_an_interruption_that_never_came_is_counted(self, why: str, outcome: str) -> None:
        made = dialogue([], turns=[ASKS], unspoken=[Unspoken("interruption", "wait", why, 9.0)])
        assert score(made).outcomes("yields") == [outcome]

    def test_a_murmur_that_never_came_is_not(self) -> None:
        made = dialogue([], turns=[ASKS], unspoken=[Unspoken("backchannel", "mhm", "agent finished", 9.0)])
        assert score(made).outcomes("yields") == []

    def test_the_users_murmur_is_no_interruption(self) -> None:
        murmur = UserTurn("backchannel", (Span(12.0, 12.5),), "mhm")
        assert score(dialogue([(10.0, 16.0)], turns=[murmur])).outcomes("yields") == []


class TestPauses:
    @pytest.mark.parametrize(
        ("start_s", "end_s", "outcome"),
        [(2.2, 3.5, "missed"), (3.1, 4.5, "missed"), (3.25, 4.5, "met"), (0.5, 1.9, "met"), (0.5, 2.1, "missed")],
    )
    def test_no_turn_sounds_in_it(self, start_s: float, end_s: float, outcome: str) -> None:
        assert turns((start_s, end_s)).outcomes("pauses") == [outcome]

    def test_anything_short_is_listening_along(self) -> None:
        assert turns((2.2, 2.7), words="oh hi").outcomes("pauses") == ["met"]  # as Whisper spells "uh huh"

    def test_too_many_words_are_a_turn_however_short(self) -> None:
        made = dialogue([(2.2, 3.1)], said((2.2, "at nine")), turns=[ASKS])
        assert score(made).outcomes("pauses") == ["met"]
        hasty = tuple(word._replace(start_s=2.2 + 0.2 * n, end_s=2.4 + 0.2 * n) for n, word in
                      enumerate(said((2.2, "we open at nine"))))  # fmt: skip
        assert score(dialogue([(2.2, 3.1)], hasty, turns=[ASKS])).outcomes("pauses") == ["missed"]

    def test_every_pause_of_a_turn_counts(self) -> None:
        three = UserTurn("turn", (Span(1, 2), Span(3, 4), Span(5, 6)), "a … b … c", answer=True)
        made = dialogue([(4.1, 5.5)], said((4.1, "let me tell you this")), turns=[three])
        assert score(made).outcomes("pauses") == ["met", "missed"]


class TestStalls:
    """The line stalled from 3.5 to 6 s: the first turn's end lies in it, and its pause and all else does not."""

    def test_what_cannot_be_timed_is_void(self) -> None:
        made = replace(perfect(), stalls=(Span(3.5, 6.0),))
        assert outcomes(made) == (["void", "met", "met"], ["met"], ["met"], ["met"], ["met"])

    def test_what_is_said_is_judged_all_the_same(self) -> None:
        made = replace(perfect(), stalls=(Span(9.0, 10.0),))
        assert score(made).outcomes("facts") == ["met"]
        assert score(made).word_errors == score(perfect()).word_errors

    def test_an_interruption_that_never_came_stays_missed(self) -> None:
        assert score(replace(silence(), stalls=(Span(0.0, 20.0),))).outcomes("yields") == ["missed"]


class TestFacts:
    def test_judged_by_what_is_heard_not_by_the_text(self) -> None:
        made = dialogue([(9.8, 11)], said((9.8, "it is three fifty")), turns=[PRICE], text="it is four fifty")
        assert score(made).outcomes("facts") == ["missed"]

    def test_the_answer_ends_where_the_user_goes_on(self) -> None:
        made = dialogue([(15.2, 17)], said((15.2, "four fifty")), turns=[PRICE, LAST])
        assert score(made).outcomes("facts") == ["missed"]

    def test_but_not_at_a_murmur(self) -> None:
        murmur = UserTurn("backchannel", (Span(10.0, 10.3),), "mhm")
        made = dialogue([(9.8, 12)], said((9.8, "that would be four fifty")), turns=[PRICE, murmur])
        assert score(made).outcomes("facts") == ["met"]

    def test_every_expected_text_is_wanted(self) -> None:
        both = UserTurn("turn", (Span(8, 9),), answer=True, asks=True, expected=("Oak Street", "nine"))
        half = dialogue([(9.3, 12)], said((9.3, "we are on oak street")), turns=[both])
        whole = dialogue([(9.3, 12)], said((9.3, "on oak street from nine on")), turns=[both])
        assert (score(half).outcomes("facts"), score(whole).outcomes("facts")) == (["missed"], ["met"])

    def test_what_cannot_be_judged_is_void_and_says_why(self) -> None:
        absent = UserTurn("turn", (Span(8, 9),), answer=True, asks=True, unjudged="the prompt does not have it")
        [event] = events(score(dialogue([], turns=[absent])), "facts")
        assert (event.outcome, event.why) == ("void", "the prompt does not have it")

    def test_another_judge_can_stand_in(self) -> None:
        heard: list[list[str]] = []

        def strict(question: UserTurn, answer: object) -> bool:
            assert question is PRICE
            heard.append(list(answer) if isinstance(answer, list) else [])
            return False

        assert score(perfect(), strict).outcomes("facts") == ["missed"]
        assert heard == [["it", "is", "four", "fifty", "and", "very", "good"]]


class TestVoice:
    @pytest.mark.parametrize(
        ("own", "other", "outcome"), [(0.9, 0.6, "met"), (0.6, 0.6, "missed"), (0.5, 0.6, "missed")]
    )
    def test_nearest_to_its_own(self, own: float, other: float, outcome: str) -> None:
        made = dialogue([(0, 3)], similarities={"NATF0": own, "NATM0": other, "NATM1": 0.1})
        assert score(made).outcomes("voice") == [outcome]

    def test_too_little_speech_is_missed(self) -> None:
        assert score(dialogue([(0, 1.9)])).outcomes("voice") == ["missed"]

    def test_without_references_it_is_void(self) -> None:
        assert score(dialogue([(0, 3)], no_voice="another model's voices")).outcomes("voice") == ["void"]
        assert score(dialogue([(0, 3)], similarities={"NATF0": 0.9})).outcomes("voice") == ["void"]


class TestWords:
    def test_errors_are_counted_against_the_text(self) -> None:
        made = score(dialogue([(4.3, 6)], said((4.3, "we open at five")), text="We open at nine, sir."))
        assert (made.word_errors, made.words_said) == (2, 5)

    def test_the_rate_is_over_all_words(self) -> None:
        short = score(dialogue([], said((4, "yes")), text="no"))
        long = score(dialogue([], said((4, "a b c d e f g h i")), text="a b c d e f g h i"))
        assert judge([short, long])[0].share == pytest.approx(0.1)

    def test_numbers_may_be_written_either_way(self) -> None:
        assert score(dialogue([], said((4, "four fifty")), text="$4.50")).word_errors == 0


class TestGates:
    def test_a_share_at_the_limit_passes(self) -> None:
        limit = {gate.measure: gate.limit for gate in OWN_GATES}
        assert limit == {None: 0.15, "turns": 0.9, "yields": 0.8, "facts": 0.8, "pauses": 0.8, "voice": 0.9}
        at_limit = [score(dialogue([(10.0, 12.1)], turns=[WAIT]))] * 4 + [score(dialogue([(10.0, 14.0)], turns=[WAIT]))]
        assert judge(at_limit)[2].passed
        assert not judge([*at_limit, score(dialogue([(10.0, 14.0)], turns=[WAIT]))])[2].passed

    def test_void_is_reported_and_not_counted(self) -> None:
        result = judge([score(dialogue([(10.0, 11.0)], turns=USER))])[2]
        assert (result.share, result.n, result.void, result.passed) == (None, 0, 1, False)

    def test_the_interval_is_wilsons(self) -> None:
        # 8 of 10: Wilson (1927), as any table has it.
        assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
        assert wilson(0, 3)[0] == 0.0
        with pytest.raises(ValueError, match="no share"):
            wilson(1, 0)

    def test_the_median_is_of_those_in_time(self) -> None:
        assert judge([score(perfect())])[1].median_delay_s == pytest.approx(0.3)

"""A witness that cannot be deceived: each way to lose or double a frame shows."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest

from loadtest.chaos.call_verdict import CallVerdict, Reference, judge_call
from loadtest.chaos.caller import CallLog, Heard
from loadtest.chaos.gaps import Gap, gaps, story
from loadtest.chaos.journals import Seen
from loadtest.chaos.plain import Redial
from loadtest.chaos.pulse import Pulse, Stall
from loadtest.chaos.verdict import Strike, Verdict, struck_at

FRAMES = 100


def tokens(frame: int) -> tuple[int, ...]:
    return (frame, *range(frame, frame + 8))


def log(frames: int = FRAMES) -> CallLog:
    call = CallLog(0, 1, session="s", ready_s=10.0)
    call.heard = [Heard(k, 10.0 + 0.08 * k, f"sound {k}") for k in range(frames)]
    call.words = ["well", " then"]
    return call


def seen(frames: int = FRAMES) -> Seen:
    journal = Seen(homes=[(1, "a")], next_frame=frames)
    journal.tokens = {frame: tokens(frame) for frame in range(frames)}
    return journal


REFERENCE = Reference.of(log(), seen())


def judge(heard: CallLog, journal: Seen) -> CallVerdict:
    return judge_call(heard, journal, REFERENCE, FRAMES)


def verdict(*calls: CallVerdict, scenario: str = "engine", limit_s: float = 5.0, missed: str = "") -> Verdict:
    return Verdict(scenario, calls, limit_s, [Strike(k, "bang") for k in (5.0, 15.0, 25.0)], missed)


def test_a_call_that_nothing_happened_to() -> None:
    call = judge(log(), seen())
    assert (call.kept, call.lost, call.doubled, call.tokens_equal, call.text_equal) == (True, 0, 0, True, True)
    assert call.longest_gap_s == pytest.approx(0.08)
    assert verdict(call, call).held


def test_a_reference_survives_being_written_down() -> None:
    assert Reference.from_json(json.loads(json.dumps(REFERENCE.as_json()))) == REFERENCE


def test_a_call_that_was_cut_short_is_not_kept() -> None:
    cut = log(60)
    cut.failure = "Lost: 1011"
    call = judge(cut, seen(60))
    assert not call.kept
    assert call.lost == 40
    assert call.why == "Lost: 1011"
    assert verdict(call).faults[0] == "1 of 1 calls were not kept"


def test_a_frame_the_caller_was_never_sent_is_lost() -> None:
    heard = log()
    del heard.heard[50]
    call = judge(heard, seen())
    assert (call.kept, call.lost) == (False, 1)


def test_a_journal_that_ends_too_early_has_lost_frames_though_all_was_heard() -> None:
    journal = seen(98)
    assert judge(log(), journal).lost == 2


def test_a_frame_no_look_caught_is_known_by_its_sound_or_not_at_all() -> None:
    journal = seen()
    del journal.tokens[50]
    call = judge(log(), journal)
    assert (call.lost, call.unseen, call.tokens_equal) == (0, 0, True)
    for digest in (None, "something else"):
        heard = log()
        heard.heard[50] = Heard(50, heard.heard[50].at_s, digest)
        call = judge(heard, journal)
        assert (call.lost, call.unseen, call.tokens_equal) == (0, 1, False)
        assert "the tokens of 1 frames were not seen" in verdict(call).faults


def test_a_number_sent_twice_is_doubled() -> None:
    heard = log()
    heard.heard.insert(51, Heard(50, 14.1, "sound 50"))
    assert judge(heard, seen()).doubled == 1


def test_a_message_beyond_the_last_frame_is_doubled() -> None:
    heard = log()
    heard.heard.append(Heard(FRAMES, 19.0, "sound x"))
    assert judge(heard, seen()).doubled == 1


def test_old_sound_under_a_new_number_is_doubled() -> None:
    heard = log()
    heard.heard[50] = Heard(50, heard.heard[50].at_s, "sound 47")
    call = judge(heard, seen())
    assert call.doubled == 1
    assert call.sound_differs == 1


def test_other_sound_is_told_but_no_double() -> None:
    heard = log()
    heard.heard[50] = Heard(50, heard.heard[50].at_s, "rebuilt, last bits differ")
    call = judge(heard, seen())
    assert (call.doubled, call.sound_differs) == (0, 1)


def test_other_tokens_are_found_where_they_begin() -> None:
    journal = seen()
    for frame in range(70, FRAMES):
        journal.tokens[frame] = tokens(0)
    call = judge(log(), journal)
    assert call.differing == 70
    assert not call.tokens_equal
    assert verdict(call).faults == ["the tokens of 1 calls differ"]


def test_a_journal_that_was_never_seen_proves_nothing() -> None:
    call = judge(log(), Seen(trouble="404"))
    assert call.lost == FRAMES
    assert "404" in call.why


def test_trimmed_frames_are_heard_as_a_gap_and_not_lost() -> None:
    heard = log()
    for frame in range(50, 60):
        heard.heard[frame] = Heard(frame, heard.heard[59].at_s, None)
    call = judge(heard, seen())
    assert (call.lost, call.trimmed, call.sound_differs) == (0, 10, 0)
    assert call.longest_gap_s == pytest.approx(11 * 0.08)
    assert call.gap_at_s == pytest.approx(60 * 0.08)
    assert verdict(call, limit_s=0.5).faults == ["a gap of 0.88 s was heard; 0.5 s are allowed"]
    assert verdict(call, limit_s=0.9).held


def test_a_scenario_that_did_not_strike_shows_nothing() -> None:
    call = judge(log(), seen())
    assert verdict(call, missed="there was no engine").faults == ["there was no engine"]
    assert Verdict("engine", [call], 5.0, [Strike(5.0, "bang")]).faults == ["only 1 strikes"]


def test_a_slot_that_nobodys_call_is_in_is_a_fault() -> None:
    call = judge(log(), seen())
    found = replace(verdict(call), leaks=["1 slots were held when everybody had hung up"])
    assert found.faults == ["1 slots were held when everybody had hung up"]
    assert found.outcome == "failed"


class TestAnUnmodifiedClient:
    @staticmethod
    def judged(*redials: Redial, asleep_s: float = 0.0) -> Verdict:
        call = judge(log(), seen())
        return replace(verdict(call, limit_s=2.0), redials=redials, witness_asleep_s=asleep_s)

    def test_is_taken_at_once(self) -> None:
        found = self.judged(Redial(10.0, "cut", ready_s=11.5))
        assert (found.faults, found.outcome) == ([], "held")
        assert found.as_json()["redials"] == [{"how": "cut", "seconds": 1.5, "refusals": []}]
        assert str(found.redials[0]) == "lost its line (cut), talked again after 1.50 s"  # type: ignore[index]

    @pytest.mark.parametrize(
        "redial",
        [
            Redial(10.0, "cut", ["no room"], 10.5),
            Redial(10.0, "cut", [], 12.5),
            Redial(10.0, "cut", ["no room", "no room"]),
        ],
    )
    def test_is_not_refused_first_nor_kept_waiting(self, redial: Redial) -> None:
        faults = ["the unmodified client was not taken at once when it dialled again"]
        found = self.judged(Redial(5.0, "cut", ready_s=5.1), redial)
        assert (found.faults, found.outcome) == (faults, "failed")
        assert self.judged(redial, asleep_s=1.5).outcome == "invalid"

    def test_shows_nothing_if_nothing_happened_to_it(self) -> None:
        assert self.judged().faults == ["the unmodified client never lost its line"]


def test_missing_text_is_a_fault() -> None:
    heard = log()
    heard.words.pop()
    assert verdict(judge(heard, seen())).faults == ["the text of 1 calls differs"]


class TestSeen:
    @staticmethod
    def look(first: int, last: int, epoch: int = 1, replica: str = "a") -> dict[str, object]:
        rows = [{"frame": k, "text_token": k, "codes": list(range(k, k + 8))} for k in range(first, last)]
        return {"epoch": epoch, "replica": replica, "numerics_id": "n", "next_frame": last, "frames": rows}

    def test_looks_are_put_together(self) -> None:
        journal = Seen()
        journal.add(self.look(0, 10))
        journal.add(self.look(9, 20, epoch=2, replica="b"))
        journal.add(self.look(19, 21, epoch=2, replica="b"))
        assert journal.tokens == {frame: tokens(frame) for frame in range(21)}
        assert journal.homes == [(1, "a"), (2, "b")]
        assert (journal.next_frame, journal.last, journal.looks) == (21, 20, 3)
        assert journal.changed == []

    def test_history_that_is_written_anew_is_noticed(self) -> None:
        journal = Seen()
        journal.add(self.look(0, 10))
        other = self.look(9, 12, epoch=2, replica="b")
        other["frames"][0]["text_token"] = 77  # type: ignore[index]
        journal.add(other)
        assert journal.changed == [9]
        assert journal.tokens[9] == tokens(9)
        assert judge(log(12), journal).doubled == 1


def silent(frames: range = range(50, 60)) -> CallLog:
    """Frame 49 is heard at 13.92, those of `frames` are trimmed, frame 60 is heard at 14.80."""
    heard = log()
    for frame in frames:
        heard.heard[frame] = Heard(frame, heard.heard[frames[-1]].at_s, None)
    return heard


def test_what_is_heard_of_a_strike_is_what_ends_after_it() -> None:
    stalls = [Stall(14.4, 14.43)]
    strike = struck_at(9.0, 14.0, "bang", [log(), silent()], stalls)
    assert (strike.at_s, strike.gap_s, strike.lag_ms) == (5.0, pytest.approx(0.88), pytest.approx(30.0))
    assert strike.story.startswith("call 0: 0.80 s until frames came, too late to be heard, 0.08 s until one was heard")
    assert struck_at(9.0, 15.0, "bang", [silent()], stalls).gap_s == pytest.approx(0.08)
    assert struck_at(9.0, 15.0, "bang", [silent()], stalls).lag_ms == 0
    assert struck_at(9.0, 5.0, "bang", [silent()], stalls).gap_s == pytest.approx(0.08)


class TestOurOwnLateness:
    """A run whose witness slept is neither held nor failed, where its sleep decides."""

    @staticmethod
    def judged(heard: CallLog, *stalls: Stall, limit_s: float = 0.5, journal: Seen | None = None) -> Verdict:
        call = judge_call(heard, journal or seen(), REFERENCE, FRAMES, stalls)
        strikes = [Strike(k, "bang") for k in (5.0, 15.0, 25.0)]
        asleep_s = max((stall.seconds for stall in stalls), default=0.0)
        return Verdict("engine", [call], limit_s, strikes, witness_asleep_s=asleep_s)

    def test_a_silence_that_we_made_ourselves_is_nobodys_fault(self) -> None:
        found = self.judged(silent(), Stall(14.0, 14.7))
        assert (found.outcome, found.held) == ("invalid", False)
        assert found.faults == ["a gap of 0.88 s was heard; 0.5 s are allowed"]
        assert found.doubts == ["this process was asleep itself, for 0.70 s at the longest"]
        assert found.as_json()["outcome"] == "invalid"

    def test_one_that_would_have_been_too_long_without_us_is_the_systems(self) -> None:
        assert self.judged(silent(), Stall(14.0, 14.2)).outcome == "failed"
        assert self.judged(silent(), Stall(11.0, 13.0)).outcome == "failed"  # at another time

    def test_one_that_may_have_begun_before_we_noticed_does_not_hold(self) -> None:
        found = self.judged(silent(), Stall(13.0, 13.95), limit_s=1.0)
        assert found.faults == []
        assert found.outcome == "invalid"
        assert found.doubts == ["it was late to note where a silence began, which may have lasted 1.80 s"]
        assert self.judged(silent(), Stall(13.0, 13.95), limit_s=1.9).outcome == "held"

    def test_a_call_may_be_lost_because_its_caller_did_not_answer(self) -> None:
        cut = log(60)
        cut.failure, cut.words = "Lost: 1006", cut.words[:1]
        assert self.judged(cut, journal=seen(60)).outcome == "failed"
        assert self.judged(cut, Stall(13.0, 13.5), journal=seen(60)).outcome == "failed"
        found = self.judged(cut, Stall(13.0, 14.2), journal=seen(60))
        assert found.outcome == "invalid"
        assert len(found.faults) == 5

    def test_no_lateness_excuses_other_tokens_a_double_or_a_hole(self) -> None:
        asleep = Stall(1.0, 9.0)
        other = seen()
        other.tokens[70] = tokens(0)
        doubled, holed = log(), log()
        doubled.heard.insert(51, Heard(50, 14.1, "sound 50"))
        assert self.judged(log(), asleep).outcome == "held"
        assert self.judged(log(), asleep, journal=other).outcome == "failed"
        assert self.judged(doubled, asleep).outcome == "failed"
        assert self.judged(log(), asleep, journal=seen(98)).outcome == "failed"
        del holed.words[0]
        assert self.judged(holed, asleep).outcome == "failed"

    def test_a_pulse_notes_when_it_was_late(self) -> None:
        pulse = Pulse()
        for beat in range(98):
            pulse.woke(float(beat), beat + 0.001)
        pulse.woke(100.0, 100.015)
        pulse.woke(101.0, 103.0)
        assert pulse.stalls == [Stall(101.0, 103.0)]
        assert pulse.p99_ms == pytest.approx(15.0)

    async def test_a_pulse_of_a_process_that_sleeps(self) -> None:
        pulse = Pulse()
        beating = asyncio.create_task(pulse.beat())
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # noqa: ASYNC251 - that is what is to be noticed
        await asyncio.sleep(0.05)
        beating.cancel()
        assert max(stall.seconds for stall in pulse.stalls) > 0.25


class TestWhatASilenceWasMadeOf:
    def test_a_line_that_was_lost_and_had_again(self) -> None:
        heard = log()
        heard.heard = heard.heard[:50] + [Heard(k, 16.0 + 0.08 * (k - 50), "x") for k in range(50, FRAMES)]
        heard.cuts = [(14.0, "Lost"), (15.0, "Refused"), (15.2, "Refused")]
        heard.told_s = [10.0, 15.5]
        (gap,) = (each for each in gaps(heard) if each.seconds > 1)
        assert (
            story(gap, heard)
            == "0.08 s until the line was lost, 1.50 s until it was back, 3 tries, 0.50 s until one was heard"
        )

    def test_one_without_a_cut_and_our_own_part_in_it(self) -> None:
        heard = log()
        assert story(Gap(13.0, 13.08), heard) == "the line was up all the time"
        assert story(Gap(13.0, 13.5, own_s=0.4), heard) == (
            "the line was up all the time, this process asleep for 0.40 s of it"
        )

"""A witness that cannot be deceived: each way to lose or double a frame shows."""

from __future__ import annotations

import json

import pytest

from loadtest.chaos.caller import CallLog, Heard
from loadtest.chaos.journals import Seen
from loadtest.chaos.verdict import CallVerdict, Reference, Strike, Verdict, heard_after, judge_call

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


def test_what_is_heard_of_a_strike_is_what_ends_after_it() -> None:
    heard = log()
    for frame in range(50, 60):
        heard.heard[frame] = Heard(frame, heard.heard[59].at_s, None)
    heard.spoken_s = [10.0 + 0.08 * k for k in range(FRAMES)]
    heard.lags_ms = [1.0] * FRAMES
    heard.lags_ms[55] = 30.0
    # Frame 49 is heard at 13.92, frame 60 at 14.80.
    assert heard_after(14.0, [heard]) == (pytest.approx(0.88), pytest.approx(30.0))
    assert heard_after(15.0, [heard]) == (pytest.approx(0.08), pytest.approx(1.0))
    assert heard_after(5.0, [heard]) == (pytest.approx(0.08), pytest.approx(1.0))

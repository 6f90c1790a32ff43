from __future__ import annotations

from loadtest.load import CallRecord
from loadtest.report import LATE_MS, LoadReport
from loadtest.timings import Timings


def held(call: int, frames: int = 100, lag_s: float = 0.001, pause_s: float = 0.0) -> CallRecord:
    """Opened at 10 s, ready 200 ms later, each frame answered 50 ms after it was due; a pause before the 50th."""
    timings = Timings(opened_s=10.0)
    timings.on_ready(10.2)
    for k in range(frames):
        due_s = 10.2 + 0.08 * (k + 1) + (pause_s if k >= 50 else 0.0)
        timings.on_sent(due_s + lag_s, due_s)
        timings.on_heard(due_s + 0.05, 1920)
    timings.on_end(due_s + 0.1)
    return CallRecord(call, timings, "held")


def failed(call: int, outcome: str, code: str) -> CallRecord:
    timings = Timings(opened_s=10.0)
    timings.on_end(11.0)
    return CallRecord(call, timings, outcome, code, f"because of {code}")  # type: ignore[arg-type]


def test_the_object_that_is_printed() -> None:
    records = [held(0), held(1, pause_s=0.3), failed(2, "refused", "1013"), failed(3, "refused", "1013")]
    printed = LoadReport.of([*records, failed(4, "lost", "1011")]).as_json()
    # 99 gaps a call. The pause makes one of 380 ms, in which the player runs dry.
    assert printed["sessions"] == 5
    assert printed["frame_gap_ms"] == {"p50": 80.0, "p95": 80.0, "p99": 80.0, "max": 380.0}
    assert printed["ready_ms"] == 200.0
    assert printed["first_audio_ms"] == 330.0
    assert printed["underruns"] == 1
    assert printed["refusals"] == {"1013": 2}
    assert printed["closes"] == {"1011": 1}
    assert printed["generator_lag_ms"] == 1.0
    assert printed["valid"] is True
    assert printed["frames"] == 200
    assert printed["sentences"] == ["because of 1013", "because of 1011"]
    assert list(printed)[:9] == [
        "sessions", "frame_gap_ms", "ready_ms", "first_audio_ms", "underruns",
        "refusals", "closes", "generator_lag_ms", "valid",
    ]  # fmt: skip


def test_a_generator_that_was_late_spoils_the_run() -> None:
    assert LoadReport.of([held(0, lag_s=(LATE_MS - 0.1) / 1e3)]).valid
    late = LoadReport.of([held(0, lag_s=(LATE_MS + 0.1) / 1e3)])
    assert late.was_late
    assert not late.valid
    assert late.as_json()["valid"] is False


def test_one_late_frame_in_a_thousand_does_not() -> None:
    record = held(0, frames=1000)
    record.timings.sent_s[17] += 0.04
    assert LoadReport.of([record]).valid


def test_a_run_in_which_nobody_was_ready_measured_nothing() -> None:
    report = LoadReport.of([failed(0, "refused", "1013")])
    assert not report.valid
    assert not report.was_late
    assert not report.all_held
    printed = report.as_json()
    assert printed["frame_gap_ms"] is None
    assert printed["generator_lag_ms"] is None


def test_a_call_that_ended_in_silence_has_a_gap_for_it() -> None:
    record = held(0)
    record.timings.ended_s = record.timings.heard_s[-1] + 7.0
    report = LoadReport.of([record])
    assert report.frame_gap_ms is not None
    assert round(report.frame_gap_ms.max) == 7000
    assert report.underruns == 1

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from loadtest.load import CallRecord
from loadtest.load_picture import calls_up, gaps_by_second, gaps_over_time
from loadtest.timings import Timings


def record(opened_s: float, heard_s: list[float], ended_s: float) -> CallRecord:
    timings = Timings(opened_s)
    timings.on_ready(opened_s + 0.5)
    for now_s in heard_s:
        timings.on_heard(now_s, 1920)
    timings.on_end(ended_s)
    return CallRecord(0, timings, "held")


RECORDS = [record(100.0, [101.0, 101.25, 102.25], 102.3), record(101.0, [102.0], 103.0)]


def test_a_gap_belongs_to_the_second_in_which_it_ended() -> None:
    gaps = gaps_by_second(RECORDS)
    assert {second: [round(gap) for gap in each] for second, each in gaps.items()} == {1: [250], 2: [1000], 3: [1000]}


def test_calls_come_and_go() -> None:
    steps = [(round(at_s, 6), up) for at_s, up in calls_up(RECORDS)]
    assert steps == [(0.0, 0), (0.5, 1), (1.5, 2), (2.3, 1), (3.0, 0)]


def test_the_picture_is_written(tmp_path: Path) -> None:
    gaps_over_time(tmp_path / "new" / "gaps.png", RECORDS, "two calls")
    with Image.open(tmp_path / "new" / "gaps.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24) or []) > 10


def test_no_calls_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no calls"):
        gaps_over_time(tmp_path / "gaps.png", [], "nothing")

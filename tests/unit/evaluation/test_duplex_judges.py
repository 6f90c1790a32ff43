"""The judges: how speech is cut for them and words get their times; and, where they are installed, what they hear."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.duplex.dialogue import Span, Word
from evaluation.duplex.judges import fill_times, similarities, utterances, whisper_weights
from evaluation.duplex.run import JUDGES_PYTHON, REPOSITORY


class TestUtterances:
    def test_what_lies_close_is_heard_together(self) -> None:
        spans = [Span(1.0, 2.0), Span(2.5, 3.0), Span(5.0, 6.0)]
        assert utterances(spans) == [Span(1.0, 3.0), Span(5.0, 6.0)]

    def test_nothing_is_longer_than_whisper_hears(self) -> None:
        pieces = utterances([Span(0.0, 60.0)])
        assert len(pieces) == 3
        assert (pieces[0].start_s, pieces[-1].end_s) == (0.0, pytest.approx(60.0))
        assert all(one.end_s == pytest.approx(other.start_s) for one, other in itertools.pairwise(pieces))

    def test_many_close_ones_are_not_joined_beyond_that(self) -> None:
        pieces = utterances([Span(float(second), second + 0.8) for second in range(60)])
        assert all(piece.seconds <= 25 for piece in pieces)
        assert sum(piece.seconds for piece in pieces) > 50

    def test_silence_has_none(self) -> None:
        assert utterances([]) == []


class TestTimes:
    def test_known_ones_are_moved_to_the_recordings_clock(self) -> None:
        words = fill_times(["a", "b"], [(0.1, 0.3), (0.3, 0.7)], 10.0, Span(10.0, 11.0))
        assert words == [Word("a", 10.1, 10.3), Word("b", 10.3, 10.7)]

    def test_an_unknown_one_lies_between_its_neighbours(self) -> None:
        words = fill_times(["a", "xyzzy", "b"], [(0.1, 0.3), None, (0.8, 0.9)], 10.0, Span(10.0, 11.0))
        assert words[1] == Word("xyzzy", 10.3, 10.8)

    def test_several_share_by_letters(self) -> None:
        words = fill_times(["aaa", "b"], [None, None], 10.0, Span(10.2, 11.0))
        assert words == [Word("aaa", 10.2, pytest.approx(10.8)), Word("b", pytest.approx(10.8), pytest.approx(11.0))]

    def test_where_there_is_no_room_they_are_in_order_all_the_same(self) -> None:
        words = fill_times(["a", "x", "b"], [(0.1, 0.5), None, (0.4, 0.9)], 0.0, Span(0.0, 1.0))
        assert all(word.start_s <= word.end_s for word in words)
        assert [word.text for word in words] == ["a", "x", "b"]


def test_a_voice_is_most_like_itself() -> None:
    references = {name: np.eye(3, dtype=np.float32)[n] for n, name in enumerate("abc")}
    assert similarities(np.array([0.0, 0.8, 0.6], dtype=np.float32), references) == {"a": 0.0, "b": 0.8, "c": 0.6}


def test_whispers_halves_are_put_together_once(tmp_path: Path) -> None:
    for number, content in ((1, b"one "), (2, b"two")):
        data = tmp_path / f"part{number}" / "data"
        data.mkdir(parents=True)
        (data / f"model.bin.part{number}").write_bytes(content)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (data / name).write_text(name)
    parts = [SimpleNamespace(__file__=str(tmp_path / f"part{number}" / "__init__.py")) for number in (1, 2)]
    folder = whisper_weights(parts, tmp_path / "cache")
    assert (folder / "model.bin").read_bytes() == b"one two"
    (tmp_path / "part1" / "data" / "model.bin.part1").write_bytes(b"changed")
    assert (whisper_weights(parts, tmp_path / "cache") / "model.bin").read_bytes() == b"one two"


def _judges_are_here() -> bool:
    check = [str(JUDGES_PYTHON), "-m", "evaluation.duplex.judge", "--check", "."]
    return JUDGES_PYTHON.exists() and subprocess.run(check, cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.full
def test_a_scripted_conversation_is_judged_as_it_was_written(tmp_path: Path) -> None:
    """Kokoro speaks both parts; the judges hear who speaks when, what, and in whose voice."""
    if not _judges_are_here():
        pytest.skip("the judges are not installed: `personaplex train setup`")
    from evaluation.duplex.score import score
    from evaluation.duplex.verdicts import read_dialogue

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["training.evaluation_items", str(tmp_path), "--items", "2", "--scripted"],
        ["evaluation.duplex.judge", str(tmp_path)],
    ):
        subprocess.run([str(JUDGES_PYTHON), "-m", *command], cwd=REPOSITORY, env=environment, check=True)
    for folder in sorted((tmp_path / "items").iterdir()):
        result = score(read_dialogue(folder))
        assert result.word_errors <= 0.1 * result.words_said, json.dumps((folder / "judged.json").read_text())
        assert {event.outcome for event in result.events if event.measure != "facts"} == {"met"}

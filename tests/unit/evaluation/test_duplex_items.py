"""Items on disk: what is written is read again, and what is broken is said to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.duplex.items import ITEM, NOISE, USER_AUDIO, Cue, ItemError, Line, from_json, read_item, to_json
from tests.unit.evaluation.duplex_items import item, piece, turn, write

FULL = item(
    turn(0, Cue("agent", 0.8, 2.5), answer=True, asks=True, expected=("four fifty",), script="It is four fifty."),
    Line("turn", Cue("user", 0.5), (piece(1, "well"), piece(2, "bye")), (1.25,)),
    Line("interruption", Cue("agent_speaks", 1.5), (piece(3, "wait"),)),
    noise=True,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_item(write(tmp_path / FULL.name, FULL)) == FULL


def test_json_and_back() -> None:
    assert from_json(json.loads(json.dumps(to_json(FULL)))) == FULL


@pytest.mark.parametrize("name", [USER_AUDIO, NOISE])
def test_its_sound_must_be_there(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "a", FULL)
    (folder / name).unlink()
    with pytest.raises(ItemError, match=name):
        read_item(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"lines": None}, "not whole"),
        ({"voice": ...}, "not whole"),
    ],
)
def test_what_is_no_item_is_refused(change: dict[str, object], message: str) -> None:
    raw = {**to_json(FULL), **change}
    with pytest.raises(ItemError, match=message):
        from_json({name: value for name, value in raw.items() if value is not ...})


@pytest.mark.parametrize("change", [{"kind": "song"}, {"pauses_s": [0.5]}, {"pieces": []}])
def test_what_is_no_line_is_refused(change: dict[str, object]) -> None:
    raw = to_json(item(turn(0, Cue("user", 0.5))))
    raw["lines"] = [{**raw["lines"][0], **change}]
    with pytest.raises(ItemError, match="not whole"):
        from_json(raw)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", FULL)
    (folder / ITEM).write_text("{", encoding="utf-8")
    with pytest.raises(ItemError, match=ITEM):
        read_item(folder)

"""What an item is: a scripted user who reacts to the agent, in a folder of user.flac, item.json and maybe noise.flac.

`user.flac` holds everything that the user may say, one piece after the other; `item.json` says which piece belongs to
which line, and what has to happen before the line is said. Any suite that writes such folders can be evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["turn", "interruption", "backchannel", "aside"]
After = Literal["agent", "agent_speaks", "user"]

ITEM, USER_AUDIO, NOISE = "item.json", "user.flac", "noise.flac"
FORMAT = 1


class ItemError(ValueError):
    """An item's folder cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Cue:
    """What a line waits for, counted from the end of the user's line before (or the call's beginning).

    agent         the agent has spoken and then been silent for `wait_s`; one that has not begun within `patience_s`
                  is not waited for any longer
    agent_speaks  the agent has spoken for `wait_s` and still does; if it has not begun within `patience_s`, or falls
                  silent too soon, the line is left out, and the recording says so
    user          `wait_s` have passed
    """

    after: After
    wait_s: float
    patience_s: float = 4.0


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` of user.flac; in them speech sounds from `speech_s[0]` to `speech_s[1]` seconds."""

    text: str
    start: int
    stop: int
    speech_s: tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Something the user says, with `pauses_s` between its pieces (one fewer than pieces).

    answer: the agent is to speak after it. asks: it is a question about the prompt's facts; a right answer contains
    every text of `expected`, which is empty where no wording can be expected. `unjudged` says why, then.
    """

    kind: Kind
    cue: Cue
    pieces: tuple[Piece, ...]
    pauses_s: tuple[float, ...] = ()
    answer: bool = False
    asks: bool = False
    expected: tuple[str, ...] = ()
    unjudged: str = ""
    script: str = ""  # what the training script lets the agent answer; for a reader of the report

    @property
    def text(self) -> str:
        return " … ".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Item:
    """One conversation to be held."""

    name: str
    role: str
    prompt: str
    voice: str  # by the name that the server knows
    seed: int
    lines: tuple[Line, ...]
    noise: bool = False  # noise.flac is looped under everything


def to_json(item: Item) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(item)}


def from_json(raw: Mapping[str, Any]) -> Item:
    """Raises ItemError if it is no item, or one of another format."""
    if raw.get("format") != FORMAT:
        raise ItemError(f"an item of format {raw.get('format')!r}; this program reads {FORMAT}")
    try:
        lines = tuple(_line(line) for line in raw["lines"])
        return Item(raw["name"], raw["role"], raw["prompt"], raw["voice"], int(raw["seed"]), lines, bool(raw["noise"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ItemError(f"the item is not whole: {error!r}") from error


def read_item(folder: Path) -> Item:
    """Raises ItemError if the folder holds no item that can be played."""
    path = folder / ITEM
    try:
        item = from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ItemError(f"{path} cannot be read: {error}") from error
    except ItemError as error:
        raise ItemError(f"{path}: {error}") from error
    for needed in (USER_AUDIO, NOISE) if item.noise else (USER_AUDIO,):
        if not (folder / needed).is_file():
            raise ItemError(f"{path} needs {needed} beside it")
    return item


def item_folders(folder: Path) -> list[Path]:
    """The folders of all items, in order of their names."""
    return sorted(path.parent for path in folder.glob(f"*/{ITEM}"))


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all: a file that is there can be relied on when an evaluation is taken up again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _line(raw: Mapping[str, Any]) -> Line:
    cue, pieces = raw["cue"], tuple(_piece(piece) for piece in raw["pieces"])
    pauses = tuple(float(pause) for pause in raw["pauses_s"])
    if raw["kind"] not in get_args(Kind) or cue["after"] not in get_args(After):
        raise ValueError(f"unknown kind {raw['kind']!r} or cue {cue['after']!r}")
    if not pieces or len(pauses) != len(pieces) - 1:
        raise ValueError(f"{len(pieces)} pieces do not go with {len(pauses)} pauses")
    return Line(
        kind=raw["kind"],
        cue=Cue(cue["after"], float(cue["wait_s"]), float(cue["patience_s"])),
        pieces=pieces,
        pauses_s=pauses,
        answer=bool(raw["answer"]),
        asks=bool(raw["asks"]),
        expected=tuple(str(text) for text in raw["expected"]),
        unjudged=str(raw["unjudged"]),
        script=str(raw["script"]),
    )


def _piece(raw: Mapping[str, Any]) -> Piece:
    begin, end = (float(value) for value in _pair(raw["speech_s"]))
    return Piece(str(raw["text"]), int(raw["start"]), int(raw["stop"]), (begin, end))


def _pair(values: Sequence[Any]) -> tuple[Any, Any]:
    first, second = values
    return first, second

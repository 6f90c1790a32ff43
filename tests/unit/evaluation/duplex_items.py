"""Small items for tests: tones for speech, one second each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from evaluation.duplex.items import ITEM, NOISE, USER_AUDIO, Cue, Item, Line, Piece, to_json, write_json
from evaluation.duplex.user import FRAME_SAMPLES, RATE, Samples

# A frame's edge, so that what is played can be told by frames.
SECOND = 12 * FRAME_SAMPLES  # 0.96 s


def tone(samples: int = SECOND, level: float = 0.3) -> Samples:
    wave: Samples = (level * np.sin(np.arange(samples) * (2 * np.pi * 220 / RATE))).astype(np.float32)
    return wave


def piece(number: int, text: str = "hello") -> Piece:
    """The piece of that number in `speech()`; it sounds from 0.02 to 0.9 s."""
    return Piece(text, number * SECOND, (number + 1) * SECOND, (0.02, 0.9))


def speech(pieces: int = 4) -> Samples:
    return tone(pieces * SECOND)


def item(*lines: Line, noise: bool = False, name: str = "00000-cafe", voice: str = "NATF0") -> Item:
    return Item(name, "cafe", "You work for Blue Door Coffee.", voice, 7, lines, noise)


def turn(number: int, cue: Cue, **fields: object) -> Line:
    """A line of one piece; fields as in Line."""
    return Line(**{"kind": "turn", "cue": cue, "pieces": (piece(number),), **fields})  # type: ignore[arg-type]


def write(folder: Path, made: Item) -> Path:
    """As a suite's maker writes it."""
    folder.mkdir(parents=True)
    soundfile.write(folder / USER_AUDIO, speech(), RATE, format="FLAC")
    if made.noise:
        soundfile.write(folder / NOISE, np.full(RATE, 0.001, dtype=np.float32), RATE, format="FLAC")
    write_json(folder / ITEM, to_json(made))
    return folder

"""Judges held conversations, in the judges' own environment: `.venv-train/bin/python -m evaluation.duplex.judge OUT`.

Every item that has a recording and no verdict gets one (`judged.json`). Can be stopped at any moment and goes on where
it was. Prints one line of JSON for each item, for the command that started it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.duplex.items import item_folders, write_json
from evaluation.duplex.judges import RATE, Audio, Judges, NoJudges, missing, similarities
from evaluation.duplex.recording import CONVERSATION, RECORDING
from evaluation.duplex.score import LEAST_VOICE_S
from evaluation.duplex.verdicts import JUDGED, REFERENCES, Verdict

AGENT = 1  # its channel in conversation.flac
NO_JUDGES = 3  # exit status
CACHE = Path(__file__).resolve().parents[2] / ".state" / "packages"


def waiting(out: Path) -> list[Path]:
    """The items that have been recorded and not judged since."""
    return [folder for folder in item_folders(out / "items") if not is_judged(folder) and (folder / RECORDING).exists()]


def is_judged(folder: Path) -> bool:
    """Whether the verdict is of this recording: a conversation may have been held again."""
    recording, judged = folder / RECORDING, folder / JUDGED
    return recording.exists() and judged.exists() and judged.stat().st_mtime_ns >= recording.stat().st_mtime_ns


def judge(folder: Path, judges: Judges, references: Mapping[str, npt.NDArray[np.float32]]) -> Verdict:
    """One conversation's verdict."""
    audio = read(folder / CONVERSATION, AGENT)
    speech = judges.speech(audio)
    words, guessed = judges.words(audio, speech)
    likeness: dict[str, float] = {}
    if references and sum(span.seconds for span in speech) >= LEAST_VOICE_S:
        voiced = [audio[int(span.start_s * RATE) : int(span.end_s * RATE)] for span in speech]
        likeness = similarities(judges.voice(np.concatenate(voiced)), references)
    return Verdict(judges.names, tuple(speech), tuple(words), guessed, likeness)


def read(path: Path, channel: int = 0) -> Audio:
    """One channel at 16 kHz: [n] float32."""
    soundfile: Any = importlib.import_module("soundfile")
    soxr: Any = importlib.import_module("soxr")
    sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    low: Audio = np.ascontiguousarray(soxr.resample(sound[:, channel], rate, RATE), dtype=np.float32)
    return low


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of an evaluation")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where Whisper's weights are put together")
    parser.add_argument("--check", action="store_true", help="only say whether the judges are here")
    arguments = parser.parse_args()
    if arguments.check:
        return NO_JUDGES if missing() else 0
    todo = waiting(arguments.out)
    if not todo:
        return 0
    try:
        judges = Judges(arguments.cache)
    except NoJudges as error:
        print(error, file=sys.stderr)
        return NO_JUDGES
    files = sorted((arguments.out / REFERENCES).glob("*.flac"))
    references = {path.stem: judges.voice(read(path)) for path in files}
    for folder in todo:
        verdict = judge(folder, judges, references)
        write_json(folder / JUDGED, verdict.to_json())
        print(json.dumps({"judged": folder.name, "words": len(verdict.words)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

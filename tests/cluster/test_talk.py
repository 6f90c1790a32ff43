"""`personaplex talk` through the real actors, in a process of its own: length, words, and the same again by seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

RATE_IN = 44_100
SECONDS = 1.93  # no whole number of frames


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("talk") / "question.wav"
    times = np.arange(int(RATE_IN * SECONDS)) / RATE_IN
    soundfile.write(path, np.stack([0.3 * np.sin(2 * np.pi * 220 * times)] * 2, axis=1), RATE_IN)
    return path


def talk(question: Path, folder: Path, *options: str) -> tuple[npt.NDArray[np.int16], dict[str, Any]]:
    command = [sys.executable, "-m", "serving.cli.main", "talk", str(question), str(folder / "a.wav")]
    command += ["--checkpoint", "demo-random"]  # it babbles, so there are words to look at
    done = subprocess.run(
        [*command, "--text", str(folder / "a.json"), *options], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stderr
    pcm, rate = soundfile.read(folder / "a.wav", dtype="int16")
    assert rate == 24_000
    return pcm, json.loads((folder / "a.json").read_text())


def test_an_answer_is_as_long_as_the_question_and_the_same_again_by_seed(question: Path, tmp_path: Path) -> None:
    role = tmp_path / "role.txt"
    role.write_text("You enjoy having a good conversation.\n")
    pcm, words = talk(question, tmp_path, "--seed", "7", "--voice", "NATM1", "--role", f"@{role}")
    assert len(pcm) == pytest.approx(24_000 * SECONDS, abs=1)
    assert words["voice"] == "NATM1"
    assert words["role"] == "You enjoy having a good conversation."
    assert np.array(words["tokens"]).shape == (25, 9)
    said = [frame for frame, tokens in enumerate(words["tokens"]) if tokens[0] not in (0, 3)]
    assert {round(piece["start_s"] / 0.08) for piece in words["pieces"]} <= set(said)

    again, words_again = talk(question, tmp_path, "--seed", "7", "--voice", "NATM1", "--role", f"@{role}")
    assert np.array_equal(pcm, again)
    assert words_again == words

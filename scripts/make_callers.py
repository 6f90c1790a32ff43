"""Makes the recordings in loadtest/data: one caller each, with pauses in which an agent can answer.

    personaplex train setup && .venv-train/bin/python scripts/make_callers.py

The sentences are ours, the voices are Kokoro-82M's (Apache-2.0), which the demo model's users have, too.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.config import FRAME_SAMPLES
from training.kokoro import RATE, Kokoro

LEAD_IN_S = 0.6
PEAK = 0.56
FOLDER = Path(__file__).parents[1] / "loadtest" / "data"
ROOM_NOISE = 3e-4  # digital silence between sentences is something no microphone sends

# A voice, then what is said (text) and for how long nothing is (seconds).
CALLERS: dict[str, tuple[str, tuple[str | float, ...]]] = {
    "sky": ("af_sarah", (
        "Hi there.", 3.4,
        "I always wondered why the sky looks blue.", 7.5,
        "I see. And how do airplanes fly?", 7.5,
        "Thanks, that helps.", 2.0,
    )),
    "exam": ("am_adam", (
        "Hello.", 3.4,
        "My exam is tomorrow, and I'm scared.", 7.5,
        "How can I learn faster?", 7.5,
        "Thank you very much.", 3.0,
    )),
    "supper": ("bf_alice", (
        "Hi.", 3.4,
        "I'm hungry, what should I eat?", 5.0,
        "What music do you like?", 5.0,
        "I slept so badly last night.", 5.0,
    )),
    "evening": ("am_echo", (
        "Hello.", 3.4,
        "It's raining, and I'm so bored.", 5.0,
        "What are you doing this weekend?", 5.0,
        "Guess what, it's my birthday.", 5.0,
    )),
}  # fmt: skip


def silence(seconds: float) -> npt.NDArray[np.float32]:
    return np.zeros(round(RATE * seconds), dtype=np.float32)


def main() -> None:
    soundfile: Any = importlib.import_module("soundfile")
    noise, voice_of = np.random.default_rng(1), Kokoro()

    def say(voice: str, text: str) -> npt.NDArray[np.float32]:
        speech = voice_of.say(text, voice).pcm.astype(np.float32)
        return speech * np.float32(PEAK / np.abs(speech).max())

    for name, (voice, script) in CALLERS.items():
        parts = [silence(LEAD_IN_S)]
        parts += [silence(part) if isinstance(part, float) else say(voice, part) for part in script]
        speech = np.concatenate(parts)
        speech = np.pad(speech, (0, -len(speech) % FRAME_SAMPLES))
        speech += noise.standard_normal(len(speech)).astype(np.float32) * np.float32(ROOM_NOISE)
        target = FOLDER / f"{name}.opus"
        soundfile.write(target, speech, RATE, format="OGG", subtype="OPUS", compression_level=0.9)
        print(f"{target.name}: {len(speech) / RATE:.1f} s, {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()

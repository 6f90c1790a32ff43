"""Made the recordings beside this file: one caller each, with pauses in which an agent can answer.

    apt-get install flite && python loadtest/data/make_speech.py

The sentences are ours, the voices are flite's, whose licence lets what they say be shipped freely.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

RATE = 24_000
FRAME_SAMPLES = 1_920
LEAD_IN_S = 0.6
PEAK = 0.56
ROOM_NOISE = 3e-4  # digital silence between sentences is something no microphone sends

# A voice of flite's, then what is said (text) and for how long nothing is (seconds).
CALLERS: dict[str, tuple[str, tuple[str | float, ...]]] = {
    "kitchen": (
        "slt",
        (
            "Good morning. My kitchen tap has been dripping since last night.",
            2.2,
            "It is the cold one, and it gets worse when I turn it off.",
            2.0,
            "Could somebody come by on Thursday, after four o'clock?",
            2.4,
            "Thank you. That would help me a lot.",
            1.4,
        ),
    ),
    "library": (
        "rms",
        (
            "Hello, I borrowed two books last month, and I think they are late.",
            2.2,
            "One of them is about bridges. I have not finished it yet.",
            2.2,
            "How much do I owe you, and may I keep it for another week?",
            2.6,
            "All right. I will bring the other one back tomorrow.",
            1.2,
        ),
    ),
    "physics": (
        "awb",
        (
            "I have a question about my homework.",
            1.8,
            "Why does the moon not fall down to the earth?",
            2.6,
            "Wait. You mean that it is falling all the time, and keeps missing?",
            2.4,
            "Oh, I see. Then how fast does it have to be?",
            2.2,
            "Thank you.",
            1.0,
        ),
    ),
    "evening": (
        "kal16",
        (
            "Hi. I just came back from a long walk by the river.",
            2.4,
            "It rained a little, but I did not mind.",
            2.0,
            "Have you ever noticed how quiet a town becomes in the rain?",
            2.6,
            "Yes. I should go out more often.",
            1.6,
        ),
    ),
}


def silence(seconds: float) -> npt.NDArray[np.float32]:
    return np.zeros(round(RATE * seconds), dtype=np.float32)


def say(voice: str, text: str, folder: Path) -> npt.NDArray[np.float32]:
    """One sentence as [n] float32 at 24 kHz."""
    wav = folder / "sentence.wav"
    subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(wav)], check=True)
    speech, rate = soundfile.read(wav, dtype="float32")
    speech = soxr.resample(speech, rate, RATE)
    return np.asarray(speech * (PEAK / np.abs(speech).max()), dtype=np.float32)


def main() -> int:
    if shutil.which("flite") is None:
        print("flite is missing: apt-get install flite", file=sys.stderr)
        return 1
    noise = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, (voice, script) in CALLERS.items():
            parts = [silence(LEAD_IN_S)]
            parts += [silence(p) if isinstance(p, float) else say(voice, p, Path(folder)) for p in script]
            speech = np.concatenate(parts)
            speech = np.pad(speech, (0, -len(speech) % FRAME_SAMPLES))
            speech += noise.standard_normal(len(speech)).astype(np.float32) * ROOM_NOISE
            target = Path(__file__).with_name(f"{name}.opus")
            soundfile.write(target, speech, RATE, format="OGG", subtype="OPUS", compression_level=0.9)
            print(f"{target.name}: {len(speech) / RATE:.1f} s, {target.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Who calls: the recordings that ship with the project, and the role each of them expects to talk to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from loadtest.speech import RATE, Recording, Samples, read_speech

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Caller:
    """`name` is also the recording's file name in loadtest/data."""

    name: str
    role: str

    def speech(self) -> Samples:
        """What they say: [n] float32 at 24 kHz."""
        return read_speech(DATA / f"{self.name}.opus")

    def recording(self, seconds: float = math.inf) -> Recording:
        """The same as a client sends it, or its first `seconds`."""
        speech = self.speech()
        return Recording.of(self.name, speech[: int(min(seconds * RATE, len(speech)))])


_TEACHER = "You are a wise and friendly teacher. Answer questions or provide advice in a clear and engaging way."
_FRIEND = "You enjoy having a good conversation."

# Prompts that the published model was trained with, and that the demo model knows word for word.
CALLERS = (
    Caller("sky", _TEACHER),
    Caller("exam", _TEACHER),
    Caller("supper", _FRIEND),
    Caller("evening", _FRIEND),
)

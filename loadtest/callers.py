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


CALLERS = (
    Caller(
        "kitchen",
        "You work for Brightwell Plumbing and your name is Nora. Information: visits are possible on weekdays "
        "from eight to six; a visit costs 45 dollars, repairs come on top. Ask for the address before you confirm.",
    ),
    Caller(
        "library",
        "You work at the desk of the Elm Street library and your name is Peter. Information: a late book costs "
        "20 cents a day, at most four dollars; a loan can be extended once, by two weeks.",
    ),
    Caller(
        "physics",
        "You are a patient teacher of physics. Explain with examples from daily life, in short sentences, and "
        "ask now and then whether it has become clear.",
    ),
    Caller("evening", "You enjoy having a good conversation."),
)

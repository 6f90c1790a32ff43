"""The user of an item, in real time and without I/O: frames of the agent go in, frames of the user come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from evaluation.duplex.items import Cue, Item, Line

Samples = npt.NDArray[np.float32]  # [n], 24 kHz, -1 … 1

RATE = 24_000
FRAME_SAMPLES = 1_920
FRAME_S = FRAME_SAMPLES / RATE

# What the user takes for the agent's voice while the call lasts. The scores rest on a better detector, afterwards.
LOUD = 10 ** (-42 / 20)
BEGUN_S = 0.24  # shorter noises are no answer
OVER_S = 1.0  # silent for so long, the agent has said what it had to say: too late to interrupt
LONGEST_S = 15.0  # an agent that does not stop is not listened to any longer
LEAVE_S = 1.5  # silence after which the user hangs up, once everything is said

Outcome = Literal["said", "agent silent", "agent finished"]


@dataclass(frozen=True)
class Spoken:
    """What became of a line, and when it began or was given up. On the user's clock, frame k lasts from 0.08 k on."""

    line: int
    outcome: Outcome
    at_s: float


class Ear:
    """Whether the agent is heard, a frame at a time, since the last reset."""

    def __init__(self) -> None:
        self._rest: Samples = np.zeros(0, dtype=np.float32)
        self._spoken = self._silent = 0  # frames: sums of 0.08 would drift

    def reset(self) -> None:
        """A new line's answer is listened for."""
        self._spoken = 0

    def hear(self, pcm: Samples) -> None:
        """pcm: [n] float32 at 24 kHz, any number of samples."""
        self._rest = np.concatenate([self._rest, pcm])
        while len(self._rest) >= FRAME_SAMPLES:
            frame, self._rest = self._rest[:FRAME_SAMPLES], self._rest[FRAME_SAMPLES:]
            if float(np.sqrt(np.mean(np.square(frame, dtype=np.float64)))) > LOUD:
                self._spoken += 1
                self._silent = 0
            else:
                self._silent += 1

    @property
    def spoken_s(self) -> float:
        """How long the agent has been speaking, breaths not counted."""
        return self._spoken * FRAME_S

    @property
    def silent_s(self) -> float:
        """How long it has been silent."""
        return self._silent * FRAME_S

    @property
    def begun(self) -> bool:
        return self.spoken_s >= BEGUN_S


class ScriptedUser:
    """Says an item's lines, each when its cue has come. A frame is drawn every 80 ms; that is the clock."""

    def __init__(self, item: Item, speech: Samples, noise: Samples | None = None) -> None:
        """speech: user.flac [n]; noise: noise.flac [m], looped. Raises ValueError if a line lies outside of speech."""
        for line in item.lines:
            for piece in line.pieces:
                if not 0 <= piece.start < piece.stop <= len(speech):
                    raise ValueError(f"{item.name}: {piece.text!r} lies outside of the user's {len(speech)} samples")
        self._item, self._speech, self._noise = item, speech, noise
        self._ear = Ear()
        self._frames = 0
        self._next = 0
        self._saying: Samples = np.zeros(0, dtype=np.float32)
        self._quiet_since_s = 0.0  # when the user's last line ended
        self.log: list[Spoken] = []
        self.done = False

    @property
    def now_s(self) -> float:
        """When the next frame begins."""
        return self._frames * FRAME_S

    def hear(self, pcm: Samples) -> None:
        """What arrived of the agent: [n] float32."""
        self._ear.hear(pcm)

    def frame(self) -> Samples:
        """The next 80 ms of the microphone: [1920] float32. `done` afterwards says whether the user has hung up."""
        if not len(self._saying):
            self._look_around()
        spoken, self._saying = self._saying[:FRAME_SAMPLES], self._saying[FRAME_SAMPLES:]
        out = np.zeros(FRAME_SAMPLES, dtype=np.float32)
        out[: len(spoken)] = spoken
        if self._noise is not None:
            start = self._frames * FRAME_SAMPLES
            out += self._noise[np.arange(start, start + FRAME_SAMPLES) % len(self._noise)]
        self._frames += 1
        if len(spoken):
            # Until the line is out, the agent's answer to it cannot have begun.
            self._quiet_since_s = self.now_s
            if self._listens_anew:
                self._ear.reset()
        return out

    @property
    def _listens_anew(self) -> bool:
        """Murmuring along, the user still listens to the same answer."""
        return self._item.lines[self._next - 1].kind != "backchannel"

    def _look_around(self) -> None:
        while self._next < len(self._item.lines):
            outcome = self._decide(self._item.lines[self._next].cue)
            if outcome is None:
                return
            self.log.append(Spoken(self._next, outcome, round(self.now_s, 3)))
            self._next += 1
            if outcome == "said":
                self._saying = say(self._item.lines[self._next - 1], self._speech)
                return
        self.done = self._decide(Cue("agent", LEAVE_S)) is not None

    def _decide(self, cue: Cue) -> Outcome | None:
        """Say the line, leave it out, or (None) wait."""
        ear, waited_s = self._ear, self.now_s - self._quiet_since_s
        if cue.after == "user":
            return "said" if waited_s >= cue.wait_s else None
        if cue.after == "agent":
            answered = ear.begun and ear.silent_s >= cue.wait_s
            tired = waited_s >= (LONGEST_S if ear.begun else cue.patience_s)
            return "said" if answered or tired else None
        if ear.spoken_s >= cue.wait_s and ear.silent_s < FRAME_S:
            return "said"
        if ear.begun and ear.silent_s >= OVER_S:
            return "agent finished"
        if not ear.begun and waited_s >= cue.patience_s:
            return "agent silent"
        return None


def say(line: Line, speech: Samples) -> Samples:
    """A line as it sounds, its pauses included: [n] float32."""
    parts: list[Samples] = []
    for number, piece in enumerate(line.pieces):
        parts.append(speech[piece.start : piece.stop])
        if number < len(line.pauses_s):
            parts.append(np.zeros(round(line.pauses_s[number] * RATE), dtype=np.float32))
    return np.concatenate(parts)


def speech_spans(line: Line, start_s: float) -> list[tuple[float, float]]:
    """When each piece of a line that began at `start_s` sounds, in seconds."""
    spans: list[tuple[float, float]] = []
    at_s = start_s
    for number, piece in enumerate(line.pieces):
        spans.append((at_s + piece.speech_s[0], at_s + piece.speech_s[1]))
        at_s += (piece.stop - piece.start) / RATE
        at_s += line.pauses_s[number] if number < len(line.pauses_s) else 0.0
    return spans

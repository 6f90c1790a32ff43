"""Answers begun too early: in a user's pause the agent says the first words of what it will answer, and is talked over.

A model that hears a pause for an end speaks into it, and having spoken is then silent at the real end: nothing it was
trained on goes on like that. So some dialogues do. That it begins is not learnt (`FalseStart.unlearnt`); that it stops
when the user goes on, and answers all the same when the user has finished, is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from models.config import FRAME_SAMPLES
from training.kokoro import RATE
from training.timeline import Placed, Timeline

SHARE = 0.3  # of the pauses that are long enough
_SHORTEST_S, _LONGEST_S = 0.5, 2.0  # a pause
_GAP_S = (0.2, 0.45)  # the agent takes it for an end, and answers as it would
_YIELD_S = (0.16, 0.4)


@dataclass(frozen=True)
class FalseStart:
    """The first frames of an answer, laid elsewhere."""

    answer: Placed
    frame: int
    frames: int

    @property
    def unlearnt(self) -> tuple[int, int]:
        """(from, to): its frames, and the one before.

        The sign that a word comes stands in the frame before. That it speaks on beside the user is not learnt either:
        a model that had been silent in the pause would begin to speak whenever its user went on.
        """
        return max(0, self.frame - 1), self.frame + self.frames


def false_starts(timeline: Timeline, rng: np.random.Generator) -> list[FalseStart]:
    """Some for a dialogue's pauses, in order of time."""
    turns = [item for item in timeline.placed if item.kind == "turn" and item.speaker == "user"]
    agent = [item for item in timeline.placed if item.speaker == "agent"]
    found = []
    for before, after in itertools.pairwise(turns):
        pause_s = (after.start - before.stop) / RATE
        if not _SHORTEST_S <= pause_s <= _LONGEST_S or rng.random() >= SHARE:
            continue
        if any(item.start < after.start and item.stop > before.stop for item in agent):
            continue  # it murmurs there
        answer = next((item for item in agent if item.start >= after.stop and item.kind == "turn"), None)
        if answer is None:
            continue
        start = before.stop + round(float(rng.uniform(*_GAP_S)) * RATE)
        stop = min(after.start + round(float(rng.uniform(*_YIELD_S)) * RATE), start + answer.samples)
        first = round(start / FRAME_SAMPLES)
        frames = max(1, round(stop / FRAME_SAMPLES) - first)
        found.append(FalseStart(answer, first, frames))
    return found

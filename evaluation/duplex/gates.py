"""The scores of all dialogues together, against what they have to reach. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.duplex.score import TAKES_WITHIN_S, YIELDS_WITHIN_S, Measure, Score

Tier = Literal["gate", "goal"]


@dataclass(frozen=True)
class Gate:
    """A limit on a share. `measure` None is the word error rate, the one share that has to be small."""

    name: str
    measure: Measure | None
    limit: float
    tier: Tier


OWN_GATES = (
    Gate("word errors against its own text", None, 0.15, "gate"),
    Gate(f"takes its turn within {TAKES_WITHIN_S:g} s", "turns", 0.90, "gate"),
    Gate(f"falls silent within {YIELDS_WITHIN_S * 1e3:.0f} ms of an interruption", "yields", 0.80, "gate"),
    Gate("answers from the role's facts", "facts", 0.80, "goal"),
    Gate("silent through the user's pauses", "pauses", 0.80, "goal"),
    Gate("nearest to the voice of its prompt", "voice", 0.90, "goal"),
)


@dataclass(frozen=True)
class Result:
    """A gate, and what was found. share is None where n is 0; such a gate is not passed."""

    gate: Gate
    share: float | None
    n: int  # occasions, or words
    void: int  # occasions on which nothing could be measured
    interval: tuple[float, float] | None  # 95 %, Wilson's; of a share of occasions only
    median_delay_s: float | None

    @property
    def passed(self) -> bool:
        if self.share is None:
            return False
        return self.share <= self.gate.limit if self.gate.measure is None else self.share >= self.gate.limit


def judge(scores: Sequence[Score], gates: Sequence[Gate] = OWN_GATES) -> list[Result]:
    """Every gate over all dialogues, each occasion (or word) counting the same."""
    return [_word_errors(scores, gate) if gate.measure is None else _share(scores, gate) for gate in gates]


def _word_errors(scores: Sequence[Score], gate: Gate) -> Result:
    n = sum(score.words_said for score in scores)
    wrong = sum(score.word_errors for score in scores)
    silent = sum(not score.words_said for score in scores)
    return Result(gate, wrong / n if n else None, n, silent, None, None)


def _share(scores: Sequence[Score], gate: Gate) -> Result:
    events = [event for score in scores for event in score.events if event.measure == gate.measure]
    met = [event for event in events if event.outcome == "met"]
    n = sum(event.outcome != "void" for event in events)
    delays = [event.delay_s for event in met if event.delay_s is not None]
    return Result(
        gate,
        len(met) / n if n else None,
        n,
        len(events) - n,
        wilson(len(met), n) if n else None,
        statistics.median(delays) if delays else None,
    )


def wilson(met: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share, by default at 95 %. Raises ValueError unless 0 ≤ met ≤ n and n > 0."""
    if not 0 <= met <= n or not n:
        raise ValueError(f"{met} of {n} is no share")
    share, spread = met / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)

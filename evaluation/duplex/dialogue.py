"""A dialogue as the scorer sees it: who spoke when, and what was said. Data alone.

All times are seconds on the caller's clock. The user's are known, for the evaluation played them; the agent's come from
the judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from evaluation.duplex.items import Kind


class Span(NamedTuple):
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Word(NamedTuple):
    """A word of the agent's as it was heard, in the form of `words.spoken`."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class UserTurn:
    """Something the user said. Between its `spans` the user pauses and has not finished.

    The fields from `answer` on are those of `items.Line`.
    """

    kind: Kind
    spans: tuple[Span, ...]
    text: str = ""
    answer: bool = False
    asks: bool = False
    expected: tuple[str, ...] = ()
    unjudged: str = ""
    script: str = ""

    @property
    def start_s(self) -> float:
        return self.spans[0].start_s

    @property
    def end_s(self) -> float:
        return self.spans[-1].end_s

    @property
    def pauses(self) -> tuple[Span, ...]:
        return tuple(Span(a.end_s, b.start_s) for a, b in zip(self.spans, self.spans[1:], strict=False))


@dataclass(frozen=True)
class Unspoken:
    """A line that was not said because its cue never came; at_s: when that was plain."""

    kind: Kind
    text: str
    why: str  # "agent silent": it never began; "agent finished": it was done too soon
    at_s: float


@dataclass(frozen=True)
class Dialogue:
    """One conversation. `turns` in order of time."""

    turns: tuple[UserTurn, ...]
    speech: tuple[Span, ...]  # when the agent's voice sounds
    words: tuple[Word, ...] = ()  # what Whisper heard of it
    text: str = ""  # what the agent's own text stream says
    unspoken: tuple[Unspoken, ...] = ()
    stalls: tuple[Span, ...] = ()  # the line stalled: what has to do with time cannot be measured there
    seconds: float = 0.0
    voice: str = ""
    similarities: Mapping[str, float] = field(default_factory=dict)  # of the agent's voice to each voice's reference
    no_voice: str = ""  # why there are none, if it is not the agent's doing

"""What became of a run: all its calls and strikes together, and what they prove. Pure.

A witness that was asleep itself can say less. A silence counts for certain only as far as this process was awake in
it; and calls may have broken because their caller did not answer for longer than their connections bear. Where that
decides, a run is neither held nor failed: it is invalid, and has to be made again on a machine with less to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.chaos.call_verdict import CallVerdict
from loadtest.chaos.caller import HEARTBEAT_S, CallLog
from loadtest.chaos.gaps import gaps, story
from loadtest.chaos.plain import Redial
from loadtest.chaos.pulse import Stall, longest_s

AFTERMATH_S = 8.0

Outcome = Literal["held", "failed", "invalid"]


@dataclass(frozen=True)
class Strike:
    """What was done, when, and what was heard of it: the longest gap that ended within some seconds after it, and how
    long this process was asleep meanwhile at most: a gap beside a long sleep says more about this machine."""

    at_s: float  # after everybody was ready
    what: str
    gap_s: float = 0.0
    lag_ms: float = 0.0
    story: str = ""  # what that gap was made of, and whose it was

    def as_json(self) -> dict[str, Any]:
        heard = {"gap_s": round(self.gap_s, 3), "lag_ms": round(self.lag_ms), "story": self.story}
        return {"at_s": round(self.at_s, 1), "what": self.what, **heard}

    def __str__(self) -> str:
        told = f" ({self.story})" * bool(self.story)
        return f"{self.at_s:.1f} s: {self.what}; gap {self.gap_s:.2f} s{told}, own lag {self.lag_ms:.0f} ms"


def struck_at(start_s: float, at_s: float, what: str, logs: Sequence[CallLog], stalls: Sequence[Stall]) -> Strike:
    """A strike at `at_s` of our clock, in a run that began at `start_s`, and the longest gap that ended in the
    `AFTERMATH_S` after it."""
    until_s = at_s + AFTERMATH_S
    found = [(gap, log) for log in logs for gap in gaps(log, stalls) if at_s <= gap.until_s <= until_s]
    asleep = [stall for stall in stalls if stall.within_s(at_s, until_s)]
    lag_ms = longest_s(asleep) * 1e3
    if not found:
        return Strike(at_s - start_s, what, 0.0, lag_ms)
    gap, log = max(found, key=lambda each: each[0].seconds)
    return Strike(at_s - start_s, what, gap.seconds, lag_ms, f"call {log.call}: {story(gap, log)}")


@dataclass(frozen=True)
class Verdict:
    """All calls of a run of one scenario."""

    scenario: str
    calls: Sequence[CallVerdict]
    gap_limit_s: float
    strikes: Sequence[Strike]
    missed: str = ""  # why not all strikes could be made
    witness_lag_ms: float = 0.0  # p99 of how late this process's event loop was
    witness_asleep_s: float = 0.0  # and how long at most
    undisturbed_gap_s: float = 0.0  # the longest in the run that nobody disturbed
    expected_strikes: int = 3
    leaks: Sequence[str] = ()  # slots that nobody's call was in
    redials: Sequence[Redial] | None = None  # of an unmodified client that talked beside them; None: there was none

    @property
    def kept(self) -> int:
        return sum(call.kept for call in self.calls)

    @property
    def lost(self) -> int:
        return sum(call.lost for call in self.calls)

    @property
    def doubled(self) -> int:
        return sum(call.doubled for call in self.calls)

    @property
    def unseen(self) -> int:
        return sum(call.unseen for call in self.calls)

    @property
    def tokens_equal(self) -> int:
        return sum(call.tokens_equal for call in self.calls)

    @property
    def longest_gap_s(self) -> float:
        return max((call.longest_gap_s for call in self.calls), default=0.0)

    @property
    def gap_at_most_s(self) -> float:
        return max((call.gap_at_most_s for call in self.calls), default=0.0)

    @property
    def faults(self) -> list[str]:
        """What did not hold; empty if all did."""
        return [what for what, _ in self._found]

    @property
    def doubts(self) -> list[str]:
        """Why what did not hold may be our own doing, or what held may not have."""
        found = []
        if any(not certain for _, certain in self._found):
            found.append(f"this process was asleep itself, for {self.witness_asleep_s:.2f} s at the longest")
        if self.longest_gap_s <= self.gap_limit_s < self.gap_at_most_s:
            found.append(f"it was late to note where a silence began, which may have lasted {self.gap_at_most_s:.2f} s")
        return found

    @property
    def outcome(self) -> Outcome:
        if any(certain for _, certain in self._found):
            return "failed"
        return "invalid" if self.doubts else "held"

    @property
    def held(self) -> bool:
        return self.outcome == "held"

    @property
    def _found(self) -> list[tuple[str, bool]]:
        """What did not hold, and whether that is certainly the system's doing. A caller that answers no ping is taken
        for lost, so what may come of that is not, once this process has slept as long as a connection waits."""
        number, awake = len(self.calls), self.witness_asleep_s < HEARTBEAT_S
        kept = [call for call in self.calls if call.kept]
        others_text = [call for call in self.calls if not call.text_equal]
        found = [
            (number == 0, "there were no calls", True),
            (self.kept < number, f"{number - self.kept} of {number} calls were not kept", awake),
            (self.lost > 0, f"{self.lost} model frames were lost", awake or any(call.lost for call in kept)),
            (self.doubled > 0, f"{self.doubled} model frames were doubled", True),
            (
                self.tokens_equal < number,
                f"the tokens of {number - self.tokens_equal} calls differ",
                awake or any(call.differing is not None for call in self.calls),
            ),
            (
                self.longest_gap_s > self.gap_limit_s,
                f"a gap of {self.longest_gap_s:.2f} s was heard; {self.gap_limit_s:g} s are allowed",
                any(call.gap_at_least_s > self.gap_limit_s for call in self.calls),
            ),
            (
                bool(others_text),
                f"the text of {len(others_text)} calls differs",
                awake or any(call.kept for call in others_text),
            ),
            (self.unseen > 0, f"the tokens of {self.unseen} frames were not seen", awake),
            (bool(self.leaks), "; ".join(self.leaks), True),
            (self.redials is not None and not self.redials, "the unmodified client never lost its line", True),
            (
                any(each.refusals or (each.seconds or math.inf) > self.gap_limit_s for each in self.redials or ()),
                "the unmodified client was not taken at once when it dialled again",
                awake,
            ),
            (bool(self.missed), self.missed, True),
            (len(self.strikes) < self.expected_strikes and not self.missed, f"only {len(self.strikes)} strikes", True),
        ]
        return [(what, certain) for wrong, what, certain in found if wrong]

    def as_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "held": self.held,
            "outcome": self.outcome,
            "sessions": len(self.calls),
            "kept": self.kept,
            "lost": self.lost,
            "doubled": self.doubled,
            "tokens_equal": self.tokens_equal,
            "longest_gap_s": round(self.longest_gap_s, 3),
            "gap_limit_s": self.gap_limit_s,
            "undisturbed_gap_s": round(self.undisturbed_gap_s, 3),
            "trimmed": sum(call.trimmed for call in self.calls),
            "sound_differs": sum(call.sound_differs for call in self.calls),
            "witness_lag_ms": round(self.witness_lag_ms, 1),
            "witness_asleep_s": round(self.witness_asleep_s, 3),
            "strikes": [each.as_json() for each in self.strikes],
            "redials": None if self.redials is None else [each.as_json() for each in self.redials],
            "faults": self.faults,
            "doubts": self.doubts,
            "calls": [call.as_json() for call in self.calls],
        }

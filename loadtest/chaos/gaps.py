"""Silences at a caller's ear: how long for certain, and what they were made of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadtest.chaos.caller import CallLog
from loadtest.chaos.pulse import Stall


@dataclass(frozen=True, slots=True)
class Gap:
    """From one frame with sound to the next, by our clock.

    own_s: how long this process itself was asleep meanwhile, hearing nothing and saying nothing.
    unsure_s: how long it had been asleep when it noted the first of the two, which may have come so much earlier.
    """

    from_s: float
    until_s: float
    own_s: float = 0.0
    unsure_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.until_s - self.from_s

    @property
    def at_least_s(self) -> float:
        """What the system answers for, whatever we did."""
        return self.seconds - self.own_s

    @property
    def at_most_s(self) -> float:
        return self.seconds + self.unsure_s


def gaps(log: CallLog, stalls: Sequence[Stall] = ()) -> list[Gap]:
    """All silences of a call, in order: what is trimmed is not heard."""
    at_s = [heard.at_s for heard in log.heard if heard.digest is not None]
    return [_gap(before, after, stalls) for before, after in pairwise(at_s)]


def _gap(from_s: float, until_s: float, stalls: Sequence[Stall]) -> Gap:
    own_s = sum(stall.within_s(from_s, until_s) for stall in stalls)
    unsure_s = max((from_s - stall.from_s for stall in stalls if stall.from_s < from_s <= stall.until_s), default=0.0)
    return Gap(from_s, until_s, own_s, unsure_s)


def story(gap: Gap, log: CallLog) -> str:
    """What a silence was made of, as far as its caller could see: a lost line and the way back, or none."""
    cuts = [at_s for at_s, _ in log.cuts if gap.from_s <= at_s <= gap.until_s]
    backs = [at_s for at_s in log.told_s if gap.from_s <= at_s <= gap.until_s]
    trimmed = [heard.at_s for heard in log.heard if heard.digest is None and gap.from_s < heard.at_s <= gap.until_s]
    parts = []
    since_s = gap.from_s
    if cuts:
        parts.append(f"{cuts[0] - since_s:.2f} s until the line was lost")
        since_s = cuts[0]
    if backs:
        tries = f", {len(cuts)} tries" if len(cuts) > 1 else ""
        parts.append(f"{backs[-1] - since_s:.2f} s until it was back{tries}")
        since_s = backs[-1]
    if trimmed and trimmed[0] > since_s:
        parts.append(f"{trimmed[0] - since_s:.2f} s until frames came, too late to be heard")
        since_s = trimmed[0]
    parts.append(f"{gap.until_s - since_s:.2f} s until one was heard" if parts else "the line was up all the time")
    if trimmed:
        parts.append(f"{len(trimmed)} frames trimmed")
    if gap.own_s > 0:
        parts.append(f"this process asleep for {gap.own_s:.2f} s of it")
    return ", ".join(parts)

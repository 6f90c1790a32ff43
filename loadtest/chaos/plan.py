"""Which scenarios there are, what is allowed in each, and when they strike. Pure: a seed in, times out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SCENARIOS = (
    "engine", "encoder", "decoder", "replica", "node", "ingress", "router", "controller", "head",
    "drain", "scale-down", "deploy", "partition",
)  # fmt: skip

PLANNED = ("drain", "scale-down", "deploy")  # nothing dies unexpectedly: nobody may hear it
# Clients are connected to what dies or is replaced here: they come back with their tokens, to a second ingress.
CUTS_SOCKETS = ("ingress", "node", "head", "deploy")

FEW_CALLS = 3
FEW_GAP_S, MANY_GAP_S, PLANNED_GAP_S = 2.0, 5.0, 0.2

STRIKES = 3
_FIRST_S = 5.0  # everybody talks by then
_LAST_BEFORE_END_S = 10.0  # what is broken last has to be mended before the end
RECOVERY_S = 9.0  # between two strikes; Serve needs some seconds to replace a replica


def kinds(scenario: str) -> tuple[str, ...]:
    """What is struck in turn: one kind, or several joined by a plus sign, e.g. engine+drain+router.

    Raises ValueError for one that is none.
    """
    found = tuple(scenario.split("+"))
    for each in found:
        if each not in SCENARIOS:
            raise ValueError(f"{each!r} is no scenario; there are {', '.join(SCENARIOS)}")
    return found


def gap_limit_s(scenario: str, sessions: int) -> float:
    """The longest that a caller may hear nothing."""
    if all(each in PLANNED for each in kinds(scenario)):
        return PLANNED_GAP_S
    return FEW_GAP_S if sessions <= FEW_CALLS else MANY_GAP_S


@dataclass(frozen=True)
class Windows:
    """What the checkpoint remembers, in seconds of conversation."""

    model_s: float
    codec_s: float  # layers × context: what a codec's state depends on


def strike_times_s(seconds: float, seed: int, windows: Windows, strikes: int = STRIKES) -> list[float]:
    """When to strike, in seconds after everybody was ready: at random, the last after both windows have wrapped.

    Raises ValueError if the run is too short for that.
    """
    wrapped_s = max(windows.model_s, windows.codec_s)
    last_s = seconds - _LAST_BEFORE_END_S
    if last_s <= max(wrapped_s, _FIRST_S + (strikes - 1) * RECOVERY_S):
        need_s = max(wrapped_s, _FIRST_S + (strikes - 1) * RECOVERY_S) + _LAST_BEFORE_END_S + 1
        raise ValueError(f"{strikes} strikes, the last after {wrapped_s:.0f} s, take at least {need_s:.0f} seconds")
    draw = random.Random(seed)
    while True:
        times = sorted(draw.uniform(_FIRST_S, last_s) for _ in range(strikes))
        if times[-1] > wrapped_s and all(b - a >= RECOVERY_S for a, b in pairwise(times)):
            return times


def spread(times: Sequence[float]) -> str:
    return ", ".join(f"{time_s:.1f}" for time_s in times)

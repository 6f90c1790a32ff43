"""Conversations that may have killed a replica, and how many a replica rebuilds at once. Pure; time is an argument.

A conversation that was present when a replica died soon after taking it (before it had answered there for long) is a
*suspect*: it may be what kills. Suspects are rebuilt one at a time and never two on one replica, so that the next
death tells which it was; whoever was there at two deaths is refused, and the others go on.
"""

from __future__ import annotations

from enum import Enum

CONDEMNED_AT = 2  # deaths: once may be the machine, and a suspect is alone among the innocent the second time
# 25 frames answered, which clear a conversation at its ingress, take 2 s; half a second more for reports to come in.
PROBATION_S = 2.5
ROUNDS = 6  # of a second or so each, of the ten that a replica has to be gone


class Standing(Enum):
    """How a conversation is rebuilt."""

    CLEAR = "clear"
    SUSPECT = "suspect"
    CONDEMNED = "condemned"


def standing(deaths: int) -> Standing:
    """`deaths`: replicas in a row that died before they had answered 25 frames of this conversation."""
    if deaths >= CONDEMNED_AT:
        return Standing.CONDEMNED
    return Standing.SUSPECT if deaths > 0 else Standing.CLEAR


def on_probation(live_s: float | None, now_s: float) -> bool:
    """Whether a suspect that a replica reports as live since `live_s` (None: not yet) may still kill it."""
    return live_s is None or now_s < live_s + PROBATION_S


def moves_at_once(waiting: int, at_most: int) -> int:
    """How many conversations that move, nobody dead, a replica rebuilds at a time while `waiting` others want to.

    One: nobody is silent meanwhile, and whoever lives there notices least. More where many wait, so that the last of
    them has moved after about ROUNDS rebuilds.
    """
    return min(at_most, 1 + waiting // ROUNDS)


def may_rebuild(rebuilding: int, at_once: int, *, suspect: bool, has_suspect: bool) -> bool:
    """Whether a replica that reads `rebuilding` journals now may be given another: their rows come on top of those of
    the conversations that live there, whose frames are due every 80 ms."""
    return rebuilding < at_once and not (suspect and has_suspect)

"""When the next strike may come: as soon as it can be survived at all, whatever is still being replaced.

What a strike takes has to fit elsewhere: a reserve of one replica is kept, not of two, and nothing survives the loss of
slot and journal at once. A replacement that is not needed for that is not waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from loadtest.chaos.journals import AdminClient, Seen
from loadtest.chaos.strikes import Missed
from loadtest.chaos.system import System

# What takes a replica's calls with it. All other strikes take an ingress, or what is there once, or move calls on
# purpose, for which there is to be room beside them: they wait until everything is back.
TAKES_CALLS = ("engine", "encoder", "decoder", "replica", "node", "partition")
_LOOK_S = 0.25
_HEARD_MS = 1_500.0  # replicas report twice a second: who has not may be dead


async def until_survivable(
    system: System, admin: AdminClient, kind: str, seen: Sequence[Seen], until_s: float, say: Callable[[str], None]
) -> None:
    """Waits for the next strike's turn, until `until_s` of our monotonic clock, and says what for. Raises Missed, which
    says what was not there in time."""
    said: str | None = None
    while True:
        lacks = await _lacking(system, admin, kind, seen)
        if lacks is None:
            return
        if time.monotonic() >= until_s:
            raise Missed(f"{lacks} in time; give it more --seconds")
        if lacks != said:
            said = lacks
            say(f"the next strike waits: {lacks}")
        await asyncio.sleep(_LOOK_S)


async def _lacking(system: System, admin: AdminClient, kind: str, seen: Sequence[Seen]) -> str | None:
    """What a strike of that kind would not be survived for; None if it would."""
    if kind not in TAKES_CALLS:
        return None if await system.whole(0.0) else "what was struck before was not replaced"
    try:
        if not has_room(await admin.replicas()):
            return "what was struck before was not replaced, and calls would have nowhere to go"
        # Then an ingress is left as well: who is struck holds calls, and those have theirs elsewhere.
        if kind == "node" and not all(each.apart for each in seen):
            return "some calls still had slot and journal on one node"
    except httpx.HTTPError as error:
        return f"nobody said what is free ({type(error).__name__})"
    return None


def has_room(replicas: Sequence[dict[str, Any]]) -> bool:
    """Whether the calls of any replica that has some fit into the others that live.

    replicas: as the router lists them (`/admin/replicas`).
    """
    living = [each for each in replicas if each["heard_ms"] < _HEARD_MS and not each["draining"]]
    free = sum(int(each["free"]) for each in living)
    victims = [each for each in living if each["busy"]]
    fits = (free - int(each["free"]) >= int(each["busy"]) + int(each["arriving"]) for each in victims)
    return bool(victims) and len(living) > 1 and all(fits)

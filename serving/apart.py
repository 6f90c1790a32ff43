"""Slot and journal are not to die with one machine: conversations leave their ingress's own node when they can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from actors.errors import NoCapacity
from actors.interfaces import Clock
from serving.holding import Place, pause
from serving.routing import RouterPort

LOOK_EVERY_S = 1.0  # while other nodes are full, or one that was lost is being replaced
LOOK_SELDOM_S = 30.0  # where there is no other node


class Elsewhere:
    """Room on other nodes than this ingress's. One look for all conversations that wait for it, and one of them moves
    at a time: each needs a second slot for a moment, which those whose replica dies meanwhile must not miss."""

    def __init__(self, router: RouterPort, place: Place, clock: Clock) -> None:
        self._router = router
        self._place = place
        self._clock = clock
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until it is the caller's turn and another node has room, for a block in which he moves there."""
        async with self._turn:
            while (look_again_s := await self._look()) is not None:
                await pause(self._clock, look_again_s)
            yield

    async def _look(self) -> float | None:
        """None: there is room. Else when to look again."""
        try:
            replicas = await self._router.replicas()
        except NoCapacity:
            return LOOK_EVERY_S  # the router is away
        others = [replica for replica in replicas if replica.node != self._place.node]
        if any(replica.admitting and replica.free > 0 for replica in others):
            return None
        return LOOK_EVERY_S if others else LOOK_SELDOM_S

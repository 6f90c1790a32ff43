"""Whether a trunk's other end lives: both ends ping, both listen, and whoever hears nothing for `dead_s` hangs up.

websockets' own keepalive is no judge of that. It waits for room in the socket before it pings, so an end that has
stopped reading with the buffers full is never found dead; and when it has found one, it waits for a farewell.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection

from serving.trunk_fields import TrunkProtocolError

log = logging.getLogger(__name__)

LOOKS_PER_DEATH = 9  # so a death is noticed at most a ninth too late
OWN_LAG = 1.5  # a look that came later than so many intervals was our own doing, and nobody's silence


class _Counting(Connection):
    """Counts what arrives, pings and pongs included."""

    heard = 0

    def data_received(self, data: bytes) -> None:
        self.heard += 1
        super().data_received(data)


class TrunkClientConnection(_Counting, ClientConnection):
    """The ingress's end."""


class TrunkServerConnection(_Counting, ServerConnection):
    """The replica's end."""


class Silence:
    """How long nothing has been heard, in the time that we were there to listen: a process that was not scheduled for
    a second has heard nothing for a second either, and what came meanwhile waits in its socket."""

    def __init__(self, dead_s: float) -> None:
        self.look_every_s = dead_s / LOOKS_PER_DEATH
        self._dead_s = dead_s
        self._silent_s = 0.0
        self._heard = 0
        self._looked_s: float | None = None

    def look(self, heard: int, now_s: float) -> bool:
        """Whether the other end is dead, given what has been heard in all; to be asked every `look_every_s`."""
        since_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        if heard != self._heard:
            self._heard, self._silent_s = heard, 0.0
        else:
            self._silent_s += min(since_s, OWN_LAG * self.look_every_s)
        return self._silent_s >= self._dead_s - 1e-9


async def hang_up_when_silent(connection: Any, dead_s: float, who: str) -> None:
    """Aborts the connection, a TrunkClientConnection or TrunkServerConnection, when nothing has come for `dead_s`;
    then whoever reads from it or writes to it gets ConnectionClosed at once. Returns when that has happened."""
    clock, silence = asyncio.get_running_loop().time, Silence(dead_s)
    while True:
        await asyncio.sleep(silence.look_every_s)
        if silence.look(connection.heard, clock()):
            break
    log.warning("nothing was heard of %s for %g s: hanging up", who, dead_s)
    connection.transport.abort()


async def binary(connection: Connection) -> bytes:
    """The next message, at either end. Raises TrunkProtocolError if it is text, and ConnectionClosed."""
    message = await connection.recv()
    if isinstance(message, str):
        raise TrunkProtocolError("text on a binary trunk")
    return message

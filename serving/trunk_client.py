"""The ingress's end of the trunk: one connection per replica, shared by all conversations that live there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from actors.errors import ReplicaLost
from actors.messages import Down, DownSink, Failed, FrameOut, Need, Ready, Up
from serving import trunk_protocol as wire
from serving.trunk_server import HELLO_TIMEOUT_S, TrunkConfig

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
UP_HIGH_WATER = 512  # messages waiting for the socket; a conversation that adds more waits its turn


class TrunkPool:
    """All trunks of one ingress process, one per replica address."""

    def __init__(self, name: str, config: TrunkConfig) -> None:
        self._name = name
        self._config = config
        self._trunks: dict[str, asyncio.Task[Trunk]] = {}

    async def get(self, address: str) -> Trunk:
        """The live trunk to a replica, connected if need be. Raises ReplicaLost when it cannot be reached."""
        for known in [known for known, task in self._trunks.items() if _over(task)]:
            del self._trunks[known]
        task = self._trunks.get(address)
        if task is None:
            task = self._trunks[address] = asyncio.create_task(Trunk.connect(address, self._name, self._config))
        # Shielded: whoever gives up waiting must not tear down what others wait for too.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Close every connection; conversations on them get ReplicaLost."""
        tasks, self._trunks = list(self._trunks.values()), {}
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Trunk):
                await outcome.close()


class Trunk:
    """One connection to one replica. Everything that is ready goes into one message."""

    def __init__(self, address: str, connection: ClientConnection) -> None:
        self.address = address
        self._connection = connection
        self._sinks: dict[tuple[str, int], DownSink] = {}
        self._outbox: deque[Up] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.lost = False
        self._tasks = (asyncio.create_task(self._send_all()), asyncio.create_task(self._receive_all()))

    @classmethod
    async def connect(cls, address: str, name: str, config: TrunkConfig) -> Trunk:
        """Raises ReplicaLost when nobody answers, or somebody who does not speak our protocol."""
        connection: ClientConnection | None = None
        try:
            connection = await connect(
                address,
                additional_headers={wire.SECRET_HEADER: config.secret},
                compression=None,
                max_size=wire.MAX_BATCH_BYTES,
                open_timeout=CONNECT_TIMEOUT_S,
                ping_interval=config.ping_s,
                ping_timeout=config.dead_s - config.ping_s,
                close_timeout=1.0,
                proxy=None,
            )
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await connection.send(wire.encode_hello(wire.Hello(name)))
                hello = wire.decode_hello(await _binary(connection))
            wire.agree(wire.VERSIONS, hello.versions)
            return cls(address, connection)
        except (OSError, TimeoutError, WebSocketException, wire.TrunkProtocolError) as error:
            log.warning("no trunk to %s: %s", address, error)
            if connection is not None:
                connection.transport.abort()
            raise ReplicaLost("The replica that was chosen cannot be reached.") from error

    def attach(self, session: str, epoch: int, sink: DownSink) -> None:
        """From now on this conversation's messages go to `sink`, Failed included when the trunk is lost."""
        if self.lost:
            raise ReplicaLost("The replica that was chosen has just been lost.")
        self._sinks[session, epoch] = sink

    def detach(self, session: str, epoch: int) -> None:
        """Deliver nothing more of this conversation."""
        self._sinks.pop((session, epoch), None)

    async def send(self, message: Up) -> None:
        """Queue a message; waits while the socket takes less than is offered. Raises ReplicaLost."""
        while not self._room.is_set() and not self.lost:
            await self._room.wait()
        self.send_nowait(message)

    def send_nowait(self, message: Up) -> None:
        """Queue a message that must not wait (a close). Raises ReplicaLost."""
        if self.lost:
            raise ReplicaLost("The replica that held the conversation is gone.")
        self._outbox.append(message)
        self._wake.set()
        if len(self._outbox) >= UP_HIGH_WATER:
            self._room.clear()

    async def close(self) -> None:
        """Close the connection and wait until both its tasks are over."""
        await self._connection.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lose()

    async def _send_all(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._wake.wait()
                self._wake.clear()
                batch = list(self._outbox)
                self._outbox.clear()
                self._room.set()
                await self._connection.send(wire.encode_batch(batch))

    async def _receive_all(self) -> None:
        try:
            while True:
                for message in wire.decode_down(await _binary(self._connection)):
                    self._deliver(message)
        except ConnectionClosed:
            log.warning("trunk to %s lost", self.address)
        except wire.TrunkProtocolError as error:
            log.error("trunk to %s: %s", self.address, error)
            await self._connection.close(1002, str(error)[:100])
        finally:
            self._lose()

    def _deliver(self, message: Down) -> None:
        session, epoch = _owner_of(message)
        sink = self._sinks.get((session, epoch))
        if sink is not None:  # else the conversation has just ended here, and its last frames were on their way
            sink(message)

    def _lose(self) -> None:
        """Tell everybody once. The connection's pings notice a dead end in `dead_s`, TCP a killed one at once."""
        self.lost = True
        self._room.set()
        self._tasks[0].cancel()
        sinks, self._sinks = self._sinks, {}
        for (session, epoch), sink in sinks.items():
            sink(Failed(session, epoch, ReplicaLost.code, "The replica that held the conversation is gone."))


def _over(task: asyncio.Task[Trunk]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None or task.result().lost)


def _owner_of(message: Down) -> tuple[str, int]:
    if isinstance(message, FrameOut | Need):
        return message.key.session, message.key.epoch
    assert isinstance(message, Ready | Failed)
    return message.session, message.epoch


async def _binary(connection: ClientConnection) -> bytes:
    message = await connection.recv()
    if isinstance(message, str):
        raise wire.TrunkProtocolError("text on a binary trunk")
    return message

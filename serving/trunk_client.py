"""The ingress's end of the trunk: one connection per replica, shared by all conversations that live there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from actors.errors import ReplicaLost
from actors.messages import Down, DownSink, Failed, JournalPart, Up
from serving import trunk_protocol as wire
from serving.trunk_fields import TrunkProtocolError
from serving.trunk_pulse import TrunkClientConnection, binary, hang_up_when_silent
from serving.trunk_server import HELLO_TIMEOUT_S, TrunkConfig

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
UP_HIGH_WATER = 512  # messages waiting for the socket; a conversation that adds more waits its turn
PART_LOST = "The replica was lost while it was sent a journal."
BATCH = 512  # messages at most in one of the trunk: 2 MB of frames, of the 8 that the other end takes


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

    def __init__(self, address: str, version: int, connection: ClientConnection, dead_s: float) -> None:
        self.address = address
        self.version = version  # of the protocol, as agreed with the replica
        self._connection = connection
        self._sinks: dict[tuple[str, int], DownSink] = {}
        self._outbox: deque[Up] = deque()
        self._parts: deque[tuple[JournalPart, asyncio.Future[None]]] = deque()  # of journals, one a batch
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.lost = False
        self._tasks = (
            asyncio.create_task(self._send_all()),
            asyncio.create_task(self._receive_all()),
            asyncio.create_task(hang_up_when_silent(connection, dead_s, address)),
        )

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
                ping_timeout=None,  # who is dead, serving/trunk_pulse.py says
                close_timeout=1.0,
                proxy=None,
                create_connection=TrunkClientConnection,
            )
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                await connection.send(wire.encode_hello(wire.Hello(name)))
                hello = wire.decode_hello(await binary(connection))
            return cls(address, wire.agree(wire.VERSIONS, hello.versions), connection, config.dead_s)
        except (OSError, TimeoutError, WebSocketException, TrunkProtocolError) as error:
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
        """Queue a message; waits while the socket takes less than is offered. A part of a journal waits until it has
        been sent: live frames, and other conversations' journals, go between two of them. Raises ReplicaLost."""
        if isinstance(message, JournalPart):
            await self._send_part(message)
            return
        while not self._room.is_set() and not self.lost:
            await self._room.wait()
        self.send_nowait(message)

    async def _send_part(self, part: JournalPart) -> None:
        self._raise_if_lost()
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parts.append((part, sent))
        self._wake.set()
        await sent

    def send_nowait(self, message: Up) -> None:
        """Queue a message that must not wait (a close). Raises ReplicaLost."""
        self._raise_if_lost()
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
                batch = [self._outbox.popleft() for _ in range(min(BATCH, len(self._outbox)))]
                part, sent = self._next_part()
                if part is not None:
                    batch.append(part)
                if not self._outbox and not self._parts:
                    self._wake.clear()
                if len(self._outbox) < UP_HIGH_WATER:
                    self._room.set()
                try:
                    if batch:
                        await self._connection.send(wire.encode_batch(batch))
                    _settle(sent, None)
                finally:
                    _settle(sent, ReplicaLost(PART_LOST))

    def _next_part(self) -> tuple[JournalPart | None, asyncio.Future[None] | None]:
        while self._parts:
            part, sent = self._parts.popleft()
            if not sent.done():  # else whoever sent it has given up
                return part, sent
        return None, None

    async def _receive_all(self) -> None:
        try:
            while True:
                for message in wire.decode_down(await binary(self._connection)):
                    self._deliver(message)
        except ConnectionClosed:
            log.warning("trunk to %s lost", self.address)
        except TrunkProtocolError as error:
            log.error("trunk to %s: %s", self.address, error)
            await self._connection.close(1002, str(error)[:100])
        finally:
            self._lose()

    def _deliver(self, message: Down) -> None:
        session, epoch = wire.owner_of(message)
        sink = self._sinks.get((session, epoch))
        if sink is not None:  # else the conversation has just left, and its last frames were on their way
            _hand(sink, message)

    def _lose(self) -> None:
        """Tell everybody once. A dead end is noticed in `dead_s`, a killed one at once, by TCP."""
        self.lost = True
        self._room.set()
        for task in (self._tasks[0], self._tasks[2]):
            task.cancel()
        while self._parts:
            _settle(self._parts.popleft()[1], ReplicaLost(PART_LOST))
        sinks, self._sinks = self._sinks, {}
        for (session, epoch), sink in sinks.items():
            _hand(sink, Failed(session, epoch, ReplicaLost.code, "The replica that held the conversation is gone."))

    def _raise_if_lost(self) -> None:
        if self.lost:
            raise ReplicaLost("The replica that held the conversation is gone.")


def _hand(sink: DownSink, message: Down) -> None:
    """A sink that raises is a fault of ours, in one conversation: the others on this trunk go on."""
    try:
        sink(message)
    except Exception:
        log.exception("a conversation could not take %s", type(message).__name__)


def _settle(sent: asyncio.Future[None] | None, error: ReplicaLost | None) -> None:
    """Tell whoever waits for a part to be sent, if nobody has yet and he still does."""
    if sent is None or sent.done():
        return
    if error is None:
        sent.set_result(None)
    else:
        sent.set_exception(error)


def _over(task: asyncio.Task[Trunk]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None or task.result().lost)

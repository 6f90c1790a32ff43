"""The replica's end of the trunk: one WebSocket per ingress, every ready message of all its sessions in one batch."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from actors.errors import ServingError
from actors.messages import CloseRequest, Down, DownSink, Failed, FrameIn, OpenRequest
from serving import trunk_protocol as wire

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0


class ReplicaPort(Protocol):
    """What the trunk needs of a replica; actors.replica.Replica is one."""

    async def open(self, request: OpenRequest, sink: DownSink) -> None: ...

    def offer(self, frame: FrameIn) -> None: ...

    async def close(self, session: str, epoch: int, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class TrunkConfig:
    """Both ends' numbers. `max_outbox` messages may wait for the socket: 2 s of 256 slots are 6,400."""

    secret: str
    ping_s: float = 0.3
    dead_s: float = 1.5
    max_outbox: int = 6400


class TrunkServer:
    """Listens on the replica's node and drives the replica for every ingress that connects."""

    def __init__(self, replica: ReplicaPort, name: str, config: TrunkConfig) -> None:
        self._replica = replica
        self._name = name
        self._config = config
        self._server: Server | None = None

    async def start(self, host: str, port: int = 0) -> str:
        """Bind (port 0: any free one) and return the address ingresses connect to."""
        self._server = await serve(
            self._serve,
            host,
            port,
            process_request=self._authorize,
            compression=None,  # Opus-sized gains on PCM are not worth a millisecond of a core
            max_size=wire.MAX_BATCH_BYTES,
            ping_interval=self._config.ping_s,
            ping_timeout=self._config.dead_s - self._config.ping_s,
            close_timeout=1.0,
            server_header=None,
        )
        bound = next(iter(self._server.sockets)).getsockname()[1]
        return f"ws://{f'[{host}]' if ':' in host else host}:{bound}"

    async def stop(self) -> None:
        """Close every connection; their sessions are closed with them."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _authorize(self, connection: ServerConnection, request: Request) -> Response | None:
        given = request.headers.get(wire.SECRET_HEADER, "")
        if hmac.compare_digest(given.encode(), self._config.secret.encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong trunk secret\n")

    async def _serve(self, connection: ServerConnection) -> None:
        link = _Link(connection, self._replica, self._config.max_outbox)
        try:
            ingress = await asyncio.wait_for(self._greet(connection), HELLO_TIMEOUT_S)
            await link.run()
            log.info("ingress %s left", ingress)
        except (ConnectionClosed, TimeoutError):
            log.info("an ingress's connection was lost")
        except wire.TrunkProtocolError as error:
            log.warning("closing a trunk: %s", error)
            await connection.close(1002, str(error)[:100])
        finally:
            await link.close_sessions()

    async def _greet(self, connection: ServerConnection) -> str:
        hello = wire.decode_hello(await _binary(connection))
        wire.agree(wire.VERSIONS, hello.versions)
        await connection.send(wire.encode_hello(wire.Hello(self._name)))
        return hello.name


class _Link:
    """One ingress's connection: what it opened, and what waits to be sent to it."""

    def __init__(self, connection: ServerConnection, replica: ReplicaPort, max_outbox: int) -> None:
        self._connection = connection
        self._replica = replica
        self._max_outbox = max_outbox
        self._outbox: deque[Down] = deque()
        self._wake = asyncio.Event()
        self._opened: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the connection ends. Raises ConnectionClosed or TrunkProtocolError."""
        sender = asyncio.create_task(self._send_all())
        receiver = asyncio.create_task(self._receive_all())
        try:
            done, _ = await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)

    async def close_sessions(self) -> None:
        """Nobody carries these conversations any more: free their slots now."""
        for key in list(self._opened):
            self._close(*key, "ingress_lost")
        await asyncio.gather(*self._closing)

    def sink(self, message: Down) -> None:
        """Queue a message; never blocks. An ingress that does not drain 2 s of everything is cut off."""
        if len(self._outbox) >= self._max_outbox:
            self._connection.transport.abort()
            return
        self._outbox.append(message)
        self._wake.set()

    async def _send_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch = list(self._outbox)
            self._outbox.clear()
            await self._connection.send(wire.encode_batch(batch))

    async def _receive_all(self) -> None:
        while True:
            for message in wire.decode_up(await _binary(self._connection)):
                if isinstance(message, FrameIn):
                    self._offer(message)
                elif isinstance(message, OpenRequest):
                    key = (message.session, message.epoch)
                    if key not in self._opened:  # else a repeated request: the first one's answer stands
                        self._opened[key] = asyncio.create_task(self._open(message))
                elif isinstance(message, CloseRequest):
                    self._close(message.session, message.epoch, message.reason)

    def _offer(self, frame: FrameIn) -> None:
        try:
            self._replica.offer(frame)
        except ServingError as error:
            self.sink(Failed(frame.key.session, frame.key.epoch, error.code, error.message))
        except Exception:  # as below: one conversation's end and no other's
            log.exception("frame %d of %s failed", frame.key.frame, frame.key.session)
            self.sink(Failed(frame.key.session, frame.key.epoch, "internal", "A frame could not be taken."))

    async def _open(self, request: OpenRequest) -> None:
        try:
            await self._replica.open(request, self.sink)
        except ServingError as error:
            self.sink(Failed(request.session, request.epoch, error.code, error.message))
        except Exception:  # whatever it is, it is this one conversation's end and no other's
            log.exception("open of %s failed", request.session)
            self.sink(Failed(request.session, request.epoch, "internal", "The conversation could not be opened."))

    def _close(self, session: str, epoch: int, reason: str) -> None:
        opening = self._opened.pop((session, epoch), None)
        if opening is None:
            return  # never opened on this connection, so it is not this ingress's to close
        task = asyncio.create_task(self._close_after(opening, session, epoch, reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_after(self, opening: asyncio.Task[None], session: str, epoch: int, reason: str) -> None:
        opening.cancel()  # if it is still at it; a replica's cancelled open leaves nothing behind
        await asyncio.gather(opening, return_exceptions=True)
        try:
            await self._replica.close(session, epoch, reason)
        except ServingError as error:
            log.info("close of %s: %s", session, error)  # it had ended by itself


async def _binary(connection: ServerConnection) -> bytes:
    message = await connection.recv()
    if isinstance(message, str):
        raise wire.TrunkProtocolError("text on a binary trunk")
    return message

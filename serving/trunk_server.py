"""The replica's end of the trunk: one WebSocket per ingress, every ready message of all its sessions in one batch."""

from __future__ import annotations

import asyncio
import hmac
import logging
from dataclasses import dataclass
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from serving import trunk_protocol as wire
from serving.trunk_fields import TrunkProtocolError
from serving.trunk_link import Link, ReplicaPort
from serving.trunk_pulse import TrunkServerConnection, binary, hang_up_when_silent

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class TrunkConfig:
    """Both ends' numbers, of serving.settings. `max_outbox` messages may wait for the socket: 2 s of 256 slots are
    6,400."""

    secret: str
    ping_s: float
    dead_s: float
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
            ping_timeout=None,  # who is dead, serving/trunk_pulse.py says
            close_timeout=1.0,
            server_header=None,
            create_connection=TrunkServerConnection,
        )
        bound = next(iter(self._server.sockets)).getsockname()[1]
        return f"ws://{f'[{host}]' if ':' in host else host}:{bound}"

    async def stop(self) -> None:
        """Close every connection; their sessions are left, as when an ingress dies."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _authorize(self, connection: ServerConnection, request: Request) -> Response | None:
        given = request.headers.get(wire.SECRET_HEADER, "")
        if hmac.compare_digest(given.encode(), self._config.secret.encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong trunk secret\n")

    async def _serve(self, connection: ServerConnection) -> None:
        link: Link | None = None
        pulse: asyncio.Task[None] | None = None
        try:
            ingress, version = await asyncio.wait_for(self._greet(connection), HELLO_TIMEOUT_S)
            pulse = asyncio.create_task(hang_up_when_silent(connection, self._config.dead_s, f"ingress {ingress}"))
            link = Link(connection, self._replica, version, self._config.max_outbox)
            await link.run()
            log.info("ingress %s left", ingress)
        except (ConnectionClosed, TimeoutError):
            log.info("an ingress's connection was lost")
        except TrunkProtocolError as error:
            log.warning("closing a trunk: %s", error)
            await connection.close(1002, str(error)[:100])
        finally:
            if pulse is not None:
                pulse.cancel()
            if link is not None:
                await link.leave_sessions()

    async def _greet(self, connection: ServerConnection) -> tuple[str, int]:
        hello = wire.decode_hello(await binary(connection))
        version = wire.agree(wire.VERSIONS, hello.versions)
        await connection.send(wire.encode_hello(wire.Hello(self._name)))
        return hello.name, version

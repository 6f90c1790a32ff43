"""An ASGI middleware in front of Serve: what one WebSocket client may cost before any handler sees it.

Serve's own queues between socket and handler have no bound (`MessageQueue`, `ASGIReceiveProxy`), so a client that
floods is slowed down here, where slowing down reaches its TCP window, and one that takes nothing is cut here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import websocket_limits

# Tells Serve's direct ingress (HAProxy mode) to hand the socket's `receive` to the handler as it is. Otherwise it
# reads ahead into an unbounded queue, and a handler that waits would hold nobody back.
_HAND_THROUGH = (b"x-request-disconnect-disabled", b"?1")
# What the kernel may hold for a client that has stopped reading: 0.7 s of PCM. By default it is megabytes, minutes of
# Opus, and "10 s behind" would never be noticed. 32 kB a round trip of 200 ms still is three times what PCM needs.
SEND_BUFFER_BYTES = 32 << 10
_MESSAGE_COST_BYTES = 64  # an empty message costs a wake-up too

_RATE_VARIABLE, _STALLED_VARIABLE = "PERSONAPLEX_GUARD_BYTES_PER_S", "PERSONAPLEX_GUARD_STALLED_S"


class WebSocketGuard:
    """Slows a client beyond `receive_bytes_per_s`, cuts one that takes nothing for `stalled_s`.

    A second's worth of bytes may come at once: that is a network's hiccup, not a flood.
    """

    def __init__(self, app: ASGIApp, receive_bytes_per_s: float, stalled_s: float) -> None:
        self._app = app
        self._rate = receive_bytes_per_s
        self._stalled_s = stalled_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        _bound_send_buffer(send)
        headers = [pair for pair in scope["headers"] if pair[0] != _HAND_THROUGH[0]]
        debt = 0.0
        since_s = time.monotonic()

        async def slowed() -> Message:
            nonlocal debt, since_s
            message = await receive()
            now_s = time.monotonic()
            size = len(message.get("bytes") or message.get("text") or b"") + _MESSAGE_COST_BYTES
            debt = max(0.0, debt - (now_s - since_s) * self._rate) + size
            since_s = now_s
            if debt > self._rate and message["type"] == "websocket.receive":
                await asyncio.sleep((debt - self._rate) / self._rate)
            return message

        async def bounded(message: Message) -> None:
            async with asyncio.timeout(self._stalled_s):
                await send(message)

        await self._app({**scope, "headers": [*headers, _HAND_THROUGH]}, slowed, bounded)


def _bound_send_buffer(send: Send) -> None:
    """Shorten what lies between a handler's `send` and the client. Only uvicorn's own `send` knows its socket, and
    this middleware is the outermost; anything else is left alone."""
    transport: Any = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is None:
        return
    transport.set_write_buffer_limits(high=SEND_BUFFER_BYTES)
    raw = transport.get_extra_info("socket")  # asyncio's or uvloop's wrapper of one
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def guard_environment(receive_bytes_per_s: float, stalled_s: float) -> dict[str, str]:
    """What Ray's processes must find in their environment to put the guard in front of every socket."""
    return {
        # Serve's only way left to wrap the server itself; it calls `middlewares` wherever it starts one.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.guard.middlewares",
        _RATE_VARIABLE: str(receive_bytes_per_s),
        _STALLED_VARIABLE: str(stalled_s),
    }


def require_guard() -> None:
    """For whoever answers clients. Raises RuntimeError where this process was not given `guard_environment`: Serve
    would have started it without any guard, and said nothing."""
    missing = [name for name in guard_environment(0.0, 0.0) if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"this node's environment lacks {', '.join(missing)}: start its Ray with what `python -m serving.haproxy "
            "FOLDER` prints, or deploy without --prepared-nodes"
        )


def middlewares() -> list[Middleware]:
    """Called by Serve before it starts a server; see `guard_environment`."""
    rate, stalled_s = float(os.environ[_RATE_VARIABLE]), float(os.environ[_STALLED_VARIABLE])
    websocket_limits.install(stalled_s)
    return [Middleware(WebSocketGuard, receive_bytes_per_s=rate, stalled_s=stalled_s)]

"""The whole system in a process of its own, as `personaplex serve` starts it, and callers that speak its wire."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlencode

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from loadtest.server import served

FRAME_S = 0.08
SILENCE = b"\x01" + bytes(3840)  # 80 ms for a conversation with audio=pcm


@contextmanager
def serve(**settings: Any) -> Iterator[str]:
    """A server with these settings (names as in ServeSettings); its URL, without a slash at its end.

    The model babbles unless another checkpoint is given: it has words at once, whatever it hears.
    """
    with served({"checkpoint": "demo-random", **settings}) as server:
        yield server.url


class Caller:
    """One WebSocket to /api/chat, with raw PCM unless told otherwise."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.metadata: dict[str, Any] = {}
        self.audio: list[bytes] = []
        self.arrivals_s: list[float] = []
        self.words = ""
        self.error: str | None = None

    async def ready(self, within_s: float = 60.0) -> None:
        """Wait for handshake and metadata."""
        async with asyncio.timeout(within_s):
            while not self.metadata:
                await self.take()

    async def take(self) -> int:
        """Read one message; its kind. Raises ConnectionClosed."""
        message = await self.socket.recv()
        assert isinstance(message, bytes)
        kind, payload = message[0], message[1:]
        if kind == 1:
            self.audio.append(payload)
            self.arrivals_s.append(time.monotonic())
        elif kind == 2:
            self.words += payload.decode()
        elif kind == 4:
            self.metadata |= json.loads(payload)
        elif kind == 5:
            assert self.error is None, "a second error message"
            self.error = payload.decode()
        else:
            assert kind in (0, 6), f"kind {kind}"
        return kind

    async def speak(self, frames: int, pcm: np.ndarray | None = None) -> None:
        """Send frames on an 80 ms clock and read until as many have been answered."""
        sending = asyncio.create_task(self._send(frames, pcm))
        try:
            wanted = len(self.audio) + frames
            async with asyncio.timeout(frames * FRAME_S + 30):
                while len(self.audio) < wanted:
                    await self.take()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, frames: int, pcm: np.ndarray | None) -> None:
        start_s = time.monotonic()
        for frame in range(frames):
            await asyncio.sleep(max(0.0, start_s + frame * FRAME_S - time.monotonic()))
            piece = SILENCE if pcm is None else b"\x01" + pcm[frame * 1920 : (frame + 1) * 1920].astype("<i2").tobytes()
            await self.socket.send(piece)

    async def closed(self, within_s: float = 30.0) -> tuple[int, str | None]:
        """Wait for the server to hang up; its close code, and the error message before it."""
        try:
            async with asyncio.timeout(within_s):
                while True:
                    await self.take()
        except ConnectionClosed as end:
            return (end.rcvd.code if end.rcvd else 1006), self.error


@asynccontextmanager
async def call(url: str, **query: str | int) -> AsyncIterator[Caller]:
    """A connection to /api/chat of the server at `url`; not ready yet."""
    address = f"{url.replace('http', 'ws', 1)}/api/chat?{urlencode({'audio': 'pcm'} | query)}"
    async with connect(address, max_size=None, compression=None, close_timeout=2) as socket:
        yield Caller(socket)

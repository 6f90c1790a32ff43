"""HAProxy's clocks over an open WebSocket, an hour made a second: a client that says nothing is not cut by them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from cluster.ports import free_port
from loadtest.chaos.pulse import Pulse
from serving import websocket_limits
from serving.haproxy import bundled_haproxy
from tests.chat_fakes import EchoServer, served
from tests.real_server import call

CLOCK_S = 1.0
CONFIGURATION = """
defaults
    mode http
    timeout connect 1s
    timeout client {clock_ms}ms
    timeout server {clock_ms}ms
    timeout tunnel {clock_ms}ms
frontend http
    bind 127.0.0.1:{port}
    default_backend ingress
backend ingress
    server ingress {target}
"""


@asynccontextmanager
async def behind_haproxy(url: str, folder: Path) -> AsyncIterator[str]:
    """Its URL by way of an HAProxy all of whose clocks over a WebSocket are a second."""
    binary = bundled_haproxy()
    if binary is None:
        pytest.skip("ray[serve] brings no HAProxy for this platform")
    port = free_port()
    configuration = folder / "haproxy.cfg"
    target = url.removeprefix("http://")
    configuration.write_text(CONFIGURATION.format(clock_ms=round(CLOCK_S * 1e3), port=port, target=target).lstrip())
    process = await asyncio.create_subprocess_exec(str(binary), "-db", "-f", str(configuration))
    try:
        async with asyncio.timeout(10):
            while True:
                assert process.returncode is None, "HAProxy did not start"
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    break
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_a_client_that_says_nothing_for_longer_than_any_clock_is_not_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server's pings and their answers are bytes both ways: the clocks never run for longer than between two."""

    async def quiet() -> None:
        async with call(front) as it:
            await it.ready()
            with pytest.raises(TimeoutError):  # nothing comes, and no close either
                async with asyncio.timeout(4 * CLOCK_S):
                    await it.take()
            await it.speak(6)
            assert len(it.audio) == 6

    async with echoing(monkeypatch, ping_every_s=0.2) as url, behind_haproxy(url, tmp_path) as front:
        await awake(quiet)


async def awake(talk: Callable[[], Awaitable[None]]) -> None:
    """Run `talk`; again where this process, whose pings they are, was asleep for half a clock: HAProxy was right."""
    for tries_left in (2, 1, 0):
        pulse = Pulse()
        beating = asyncio.create_task(pulse.beat())
        try:
            await talk()
            return
        except ConnectionClosed:
            if not tries_left or max((stall.seconds for stall in pulse.stalls), default=0.0) < CLOCK_S / 2:
                raise
        finally:
            beating.cancel()


async def test_without_pings_it_would_be_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or the test above would say nothing."""
    async with echoing(monkeypatch, ping_every_s=60) as url, behind_haproxy(url, tmp_path) as front, call(front) as it:
        await it.ready()
        since_s = time.monotonic()
        await it.closed(within_s=4 * CLOCK_S)
        assert time.monotonic() - since_s > CLOCK_S / 2


@asynccontextmanager
async def echoing(monkeypatch: pytest.MonkeyPatch, ping_every_s: float) -> AsyncIterator[str]:
    """An ingress as it is served, its model an echo."""
    auto = websocket_limits.uvicorn.protocols.websockets.auto
    monkeypatch.setattr(auto, "AutoWebSocketsProtocol", auto.AutoWebSocketsProtocol)
    monkeypatch.setattr(websocket_limits, "PING_EVERY_S", ping_every_s)
    websocket_limits.install()
    async with served(EchoServer()) as url:
        yield url.rstrip("/")

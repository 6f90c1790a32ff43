"""Limits below ASGI, over real sockets: what is refused is told, and the socket does not stay open for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import websockets.http11
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serving import websocket_limits
from serving.websocket_limits import LONGEST_LINE_BYTES
from tests.chat_fakes import EchoServer, served
from tests.real_server import call


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    auto = websocket_limits.uvicorn.protocols.websockets.auto
    monkeypatch.setattr(auto, "AutoWebSocketsProtocol", auto.AutoWebSocketsProtocol)
    monkeypatch.setattr(websockets.http11, "MAX_LINE_LENGTH", websockets.http11.MAX_LINE_LENGTH)
    websocket_limits.install()
    echo = EchoServer()
    async with served(echo) as url:
        yield url.rstrip("/")
    assert not echo.router.held


@pytest.mark.parametrize("size", [17 << 20, 20_000_000, 60_000_000])
async def test_a_message_of_many_megabytes_gets_its_code(server: str, size: int) -> None:
    async with call(server) as caller:
        await caller.ready()
        with suppress(ConnectionClosed):
            await caller.socket.send(b"\x01" + bytes(size))
        started_s = time.monotonic()
        code, _ = await caller.closed()
        assert code == 1009
        assert time.monotonic() - started_s < 5


async def test_a_role_in_any_script_fits(server: str) -> None:
    async with call(server, text_prompt="한" * 4000) as caller:
        await caller.ready()


async def test_a_role_of_100_000_characters_is_refused_in_words(server: str) -> None:
    async with call(server, text_prompt="x" * 100_000) as caller:
        code, error = await caller.closed()
    assert code == 1008
    assert error is not None
    assert "100000 characters" in error


@pytest.mark.parametrize("size", [LONGEST_LINE_BYTES + 1, 5_000_000])
async def test_a_longer_line_is_answered_too(server: str, size: int) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{server.replace('http', 'ws')}/api/chat?text_prompt={'x' * size}")
    assert refused.value.response.status_code == 414


async def test_one_that_never_stops_is_cut(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_limits, "LINGER_S", 0.3)
    async with call(server) as caller:
        await caller.ready()
        # The head of a frame of 4 GB, and then its bytes, without end.
        caller.socket.transport.write(b"\x82\xff" + (1 << 32).to_bytes(8, "big") + bytes(4))
        async with asyncio.timeout(10):
            while not caller.socket.transport.is_closing():
                caller.socket.transport.write(bytes(10_000))
                await asyncio.sleep(0.02)


async def test_a_frame_that_is_none_ends_with_its_code(server: str) -> None:
    async with call(server) as caller:
        await caller.ready()
        caller.socket.transport.write(b"\xff" * 100)  # reserved bits and opcode
        code, _ = await caller.closed()
        assert code == 1002

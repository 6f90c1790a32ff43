"""Limits below ASGI, over real sockets: what is refused is told, and the socket does not stay open for it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
import websockets.http11
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serving import websocket_limits
from serving.websocket_limits import LINGER_S, LONGEST_LINE_BYTES
from tests.chat_fakes import EchoServer, served
from tests.polling import until
from tests.real_server import call
from tests.virtual_time import in_virtual_time


@asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    auto = websocket_limits.uvicorn.protocols.websockets.auto
    monkeypatch.setattr(auto, "AutoWebSocketsProtocol", auto.AutoWebSocketsProtocol)
    monkeypatch.setattr(websockets.http11, "MAX_LINE_LENGTH", websockets.http11.MAX_LINE_LENGTH)
    websocket_limits.install()
    echo = EchoServer()
    async with served(echo) as url:
        yield url.rstrip("/")
    assert not echo.router.held


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    async with serving(monkeypatch) as url:
        yield url


@pytest.mark.parametrize("size", [17 << 20, 20_000_000, 60_000_000])
@in_virtual_time
async def test_a_message_of_many_megabytes_gets_its_code(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    async with serving(monkeypatch) as server, call(server) as caller:
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


@in_virtual_time
async def test_one_that_never_stops_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch) as server, call(server) as caller:
        await caller.ready()
        # The head of a frame of 4 GB, and then its bytes, without end.
        caller.socket.transport.write(b"\x82\xff" + (1 << 32).to_bytes(8, "big") + bytes(4))
        async with asyncio.timeout(2 * LINGER_S):
            while not caller.socket.transport.is_closing():
                caller.socket.transport.write(bytes(10_000))
                await asyncio.sleep(0.02)


async def test_a_frame_that_is_none_ends_with_its_code(server: str) -> None:
    async with call(server) as caller:
        await caller.ready()
        caller.socket.transport.write(b"\xff" * 100)  # reserved bits and opcode
        code, _ = await caller.closed()
        assert code == 1002


@in_virtual_time
async def test_an_opus_client_that_stops_reading_is_cut_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream is too small to fill any buffer on the way."""
    monkeypatch.setattr(websocket_limits, "PING_EVERY_S", 0.1)
    async with limited(monkeypatch, unread_s=0.5) as (url, echo), call(url, audio="opus", resume=1) as caller:
        await caller.ready()
        caller.socket.transport.pause_reading()
        started_s = time.monotonic()
        await asyncio.wait_for(echo.router.until_held(1), 5)
        (conversation,) = echo.hub.conversations
        await until_true(lambda: conversation.parked)  # it holds a token, so its slot waits
        assert 0.5 < time.monotonic() - started_s < 3.0
        conversation.end()


@in_virtual_time
async def test_a_client_that_reads_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_limits, "PING_EVERY_S", 0.05)
    async with limited(monkeypatch, unread_s=0.3) as (url, _), call(url) as caller:
        await caller.ready()
        await caller.speak(12)  # 1 s
        assert len(caller.audio) == 12


@pytest.mark.parametrize(("how", "waited_for"), [("abort", True), ("close", False)])
@in_virtual_time
async def test_a_lost_client_is_told_from_one_that_hangs_up(
    monkeypatch: pytest.MonkeyPatch, how: str, waited_for: bool
) -> None:
    async with limited(monkeypatch, unread_s=5.0) as (url, echo), call(url, resume=1) as caller:
        await caller.ready()
        (conversation,) = echo.hub.conversations
        if how == "abort":
            caller.socket.transport.abort()
        else:
            await caller.socket.close()
        await until_true(lambda: conversation.parked or conversation.over)
        assert conversation.parked is waited_for
        conversation.end()


async def until_true(look: Callable[[], bool]) -> None:
    async def looked() -> bool:
        return look()

    await until(looked, within_s=5)


@asynccontextmanager
async def limited(monkeypatch: pytest.MonkeyPatch, unread_s: float) -> AsyncIterator[tuple[str, EchoServer]]:
    auto = websocket_limits.uvicorn.protocols.websockets.auto
    monkeypatch.setattr(auto, "AutoWebSocketsProtocol", auto.AutoWebSocketsProtocol)
    monkeypatch.setattr(websockets.http11, "MAX_LINE_LENGTH", websockets.http11.MAX_LINE_LENGTH)
    monkeypatch.setattr(websocket_limits.PatientWebSockets, "unread_s", unread_s)
    websocket_limits.install(unread_s)
    echo = EchoServer()
    async with served(echo) as url:
        yield url.rstrip("/"), echo
    assert not echo.router.held


@in_virtual_time
async def test_a_server_that_is_to_end_takes_nobody_new_and_lets_those_who_talk_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Serve ends the one of an ingress that a deploy replaces, while people talk."""
    auto = websocket_limits.uvicorn.protocols.websockets.auto
    monkeypatch.setattr(auto, "AutoWebSocketsProtocol", auto.AutoWebSocketsProtocol)
    websocket_limits.install()

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "bytes": message["bytes"]})

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"

        async def refused() -> bool:
            try:
                async with connect(url):
                    return False
            except ConnectionRefusedError:
                return True

        server = uvicorn.Server(uvicorn.Config(echo, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        async with connect(url) as talking:
            await talking.send(b"before")
            assert await talking.recv() == b"before"
            server.should_exit = True
            await until(refused, within_s=5)
            for _ in range(10):
                await talking.send(b"after")
                assert await talking.recv() == b"after"
                await asyncio.sleep(0.05)
            assert not serving.done()
        await asyncio.wait_for(serving, 5)

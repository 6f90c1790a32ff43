"""What one WebSocket client may cost before a handler sees it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import connect

from serving import guard
from serving.guard import WebSocketGuard, guard_environment, middlewares, require_guard

Inner = Callable[[Scope, Receive, Send], Any]


class Sleeps(list[float]):
    """Stands in for asyncio.sleep: remembers, does not sleep."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    sleeps = Sleeps()
    monkeypatch.setattr(guard.asyncio, "sleep", sleeps)
    monkeypatch.setattr(guard.time, "monotonic", lambda: 100.0)  # everything comes at once
    return sleeps


async def run(inner: Inner, messages: list[Message], scope: dict[str, Any] | None = None, send: Any = None) -> None:
    async def receive() -> Message:
        return messages.pop(0)

    async def nowhere(_: Message) -> None:
        return None

    wrapped = WebSocketGuard(inner, receive_bytes_per_s=1000.0, stalled_s=0.01)
    await wrapped({"type": "websocket", "headers": [], **(scope or {})}, receive, send or nowhere)


def received(size: int) -> Message:
    return {"type": "websocket.receive", "bytes": b"x" * size}


def reader(count: int) -> Inner:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(count):
            await receive()

    return inner


async def test_a_second_of_the_rate_may_come_at_once_and_then_it_waits(sleeps: Sleeps) -> None:
    await run(reader(3), [received(400), received(400), received(1000)])
    assert sleeps == [pytest.approx((400 + 400 + 1000 + 3 * 64 - 1000) / 1000)]


async def test_empty_messages_and_text_cost_too(sleeps: Sleeps) -> None:
    await run(reader(20), [received(0)] * 16 + [{"type": "websocket.receive", "text": "x" * 500, "bytes": None}] * 4)
    assert len(sleeps) == 5


async def test_an_end_is_handed_on_at_once(sleeps: Sleeps) -> None:
    await run(reader(2), [received(5000), {"type": "websocket.disconnect", "code": 1001}])
    assert len(sleeps) == 1


async def test_a_client_that_takes_nothing_is_cut() -> None:
    async def stuck(_: Message) -> None:
        await asyncio.Event().wait()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.send", "bytes": b"x"})

    with pytest.raises(TimeoutError):
        await run(inner, [], send=stuck)


async def test_serve_is_told_to_hand_the_socket_through_whatever_the_client_says() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])

    await run(inner, [], scope={"headers": [(b"x-request-disconnect-disabled", b"?0"), (b"host", b"x")]})
    assert seen == [(b"host", b"x"), (b"x-request-disconnect-disabled", b"?1")]


async def test_plain_requests_pass_untouched() -> None:
    seen: list[Scope] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    await run(inner, [], scope={"type": "http"})
    assert seen[0]["headers"] == []


def test_serve_finds_it_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in guard_environment(5000, 3.0).items():
        monkeypatch.setenv(name, value)
    (middleware,) = middlewares()
    assert middleware.cls is WebSocketGuard
    assert middleware.kwargs == {"receive_bytes_per_s": 5000.0, "stalled_s": 3.0}


def test_who_was_not_given_it_does_not_answer_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = guard_environment(5000, 3.0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    require_guard()
    for name in environment:
        with monkeypatch.context() as without:
            without.delenv(name)
            with pytest.raises(RuntimeError, match=rf"lacks {name}: start its Ray with"):
                require_guard()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_kernel_holds_little_for_a_client_that_does_not_read(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Under a real uvicorn, on both loops it may run on: what the guard reaches into must still be there in the next
    version of them."""
    cut = asyncio.Event()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            for _ in range(64):  # 1 MB: the kernel alone would take that, and more
                await send({"type": "websocket.send", "bytes": bytes(16 << 10)})
        except TimeoutError:
            cut.set()

    async def connected() -> None:
        guarded = WebSocketGuard(inner, 1e6, 0.2)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            server = uvicorn.Server(uvicorn.Config(guarded, log_level="critical", lifespan="off"))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            address = f"ws://127.0.0.1:{listener.getsockname()[1]}"
            async with connect(address, proxy=None, max_queue=1, compression=None) as client:
                client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.transport.pause_reading()
                await asyncio.wait_for(cut.wait(), 30)
                client.transport.abort()
            server.should_exit = True
            await serving

    loop = new_loop()
    try:
        loop.run_until_complete(connected())
    finally:
        loop.close()

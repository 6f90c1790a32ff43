"""What one WebSocket client may cost before a handler sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving import guard
from serving.guard import WebSocketGuard, guard_environment, middlewares

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

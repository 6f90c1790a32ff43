"""The counting caller against a server of a few lines that can lose it and take it back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from loadtest.chaos.caller import Caller
from loadtest.chaos.gaps import gaps
from tests.virtual_time import in_virtual_time

SPEECH = (np.arange(4 * 1920) % 400 / 1000).astype(np.float32)


class Line:
    """A server's side of one conversation that outlives its sockets: says each frame back."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.queries: list[dict[str, list[str]]] = []

    async def greet(self, connection: ServerConnection, resumable: bool = True, first_frame: int = 0) -> None:
        assert connection.request is not None
        self.queries.append(parse_qs(urlsplit(connection.request.path).query))
        await connection.send(b"\x00")
        told: dict[str, object] = {"session": "abc", "first_frame": first_frame, "heard_frames": len(self.heard)}
        if resumable:
            told["resume_token"] = f"token {len(self.queries)}"
        await connection.send(b"\x04" + json.dumps(told).encode())

    async def answer(self, connection: ServerConnection, most: int) -> None:
        for _ in range(most):
            message = await connection.recv()
            assert isinstance(message, bytes)
            self.heard.append(message[1:])
            await connection.send(message)
        await connection.send(b"\x02.")


@asynccontextmanager
async def calling(handler: Callable[[ServerConnection], Awaitable[None]], frames: int) -> AsyncIterator[Caller]:
    async with serve(handler, "127.0.0.1", 0, compression=None) as server:
        url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
        caller = Caller(url, 0, 7, SPEECH, frames, "role", asyncio.get_running_loop().time)
        holding = asyncio.create_task(caller.hold())
        try:
            yield caller
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)


async def over(caller: Caller) -> None:
    await asyncio.wait_for(caller.over.wait(), 30)


@in_virtual_time
async def test_a_call_that_nothing_happens_to() -> None:
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        await line.greet(connection)
        await line.answer(connection, 10)
        await connection.wait_closed()

    async with calling(handler, 10) as caller:
        await over(caller)
    log = caller.log
    assert log.failure is None
    assert [heard.frame for heard in log.heard] == list(range(10))
    assert len({heard.digest for heard in log.heard}) == 4  # the recording has four frames and is said over and over
    assert log.heard[0].digest == log.heard[4].digest
    assert log.session == "abc"
    assert line.queries == [{"audio": ["pcm"], "resume": ["1"], "seed": ["7"], "text_prompt": ["role"]}]
    assert [gap.seconds for gap in gaps(log)] == pytest.approx([0.08] * 9)


@in_virtual_time
async def test_after_a_cut_it_comes_back_and_says_again_what_was_not_heard() -> None:
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        if not line.queries:
            await line.greet(connection)
            await line.answer(connection, 5)
            await connection.recv()  # a sixth frame that gets lost with us
            await connection.close(1011, "cut")
        else:
            await line.greet(connection, first_frame=5)
            await line.answer(connection, 10)
            await connection.wait_closed()

    async with calling(handler, 15) as caller:
        await over(caller)
    assert caller.log.failure is None
    assert [heard.frame for heard in caller.log.heard] == list(range(15))
    assert line.queries[1] == {"audio": ["pcm"], "resume": ["token 1"], "missed": ["replay"], "have": ["5"]}
    # Fifteen frames of their own, in order, none left out.
    assert line.heard == [line.heard[k % 4] for k in range(15)]
    assert len(caller.log.spoken_s) == 15
    assert len(caller.log.cuts) == 1
    assert caller.log.text == ".."


@in_virtual_time
async def test_a_frame_that_the_server_skips_shows_as_a_number() -> None:
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        if not line.queries:
            await line.greet(connection)
            await line.answer(connection, 3)
            await connection.close(1011, "cut")
        else:
            await line.greet(connection, first_frame=4)
            await line.answer(connection, 4)
            await connection.wait_closed()

    async with calling(handler, 8) as caller:
        await over(caller)
    assert [heard.frame for heard in caller.log.heard] == [0, 1, 2, 4, 5, 6, 7]


@in_virtual_time
async def test_trimmed_frames_have_a_number_and_no_sound() -> None:
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        await line.greet(connection)
        for k in range(4):
            message = await connection.recv()
            await connection.send(message if k % 2 else b"\x01")
        await connection.wait_closed()

    async with calling(handler, 4) as caller:
        await over(caller)
    assert [heard.digest is None for heard in caller.log.heard] == [True, False, True, False]
    assert len(gaps(caller.log)) == 1


@in_virtual_time
async def test_without_a_token_a_cut_is_the_end() -> None:
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        await line.greet(connection, resumable=False)
        await line.answer(connection, 2)
        await connection.close(1011, "the engine died")

    async with calling(handler, 9) as caller:
        await over(caller)
    assert caller.log.failure is not None
    assert "the engine died" in caller.log.failure
    assert len(line.queries) == 1


@in_virtual_time
async def test_a_server_that_takes_nobody_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.chaos.caller.GRACE_S", 0.5)
    line = Line()

    async def handler(connection: ServerConnection) -> None:
        if not line.queries:
            await line.greet(connection)
            await line.answer(connection, 2)
            await connection.close(1011, "cut")
        else:
            await connection.send(b"\x05this token was used")
            await connection.close(1008)

    async with calling(handler, 9) as caller:
        await over(caller)
    assert caller.log.failure is not None
    assert "this token was used" in caller.log.failure
    assert len(caller.log.cuts) >= 2

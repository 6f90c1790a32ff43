"""A client that knows of no tokens, against a server of a few lines that loses it and refuses it."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from loadtest.chaos.plain import PlainCaller
from tests.virtual_time import in_virtual_time

SPEECH = (np.arange(4 * 1920) % 400 / 1000).astype(np.float32)


class Server:
    """Cuts the first call, refuses the second, takes the third."""

    def __init__(self) -> None:
        self.queries: list[dict[str, list[str]]] = []
        self.heard: list[int] = []

    async def handle(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.queries.append(parse_qs(urlsplit(connection.request.path).query))
        self.heard.append(0)
        if len(self.queries) == 2:
            await connection.send(b"\x05There is no room.")
            await connection.close(1013)
            return
        await connection.send(b"\x00")
        async for message in connection:
            assert isinstance(message, bytes)
            self.heard[-1] += message[0] == 1
            if len(self.queries) == 1 and self.heard[-1] == 3:
                connection.transport.abort()


async def full() -> str:
    return "4+0 held, 0 free"


async def calling(server: Server, until_s: float) -> PlainCaller:
    async with serve(server.handle, "127.0.0.1", 0, compression=None) as listening:
        url = f"http://127.0.0.1:{next(iter(listening.sockets)).getsockname()[1]}"
        caller = PlainCaller(url, 7, SPEECH, "role", clock=asyncio.get_running_loop().time, rooms=full)
        holding = asyncio.create_task(caller.hold())
        await asyncio.sleep(until_s)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
    return caller


@in_virtual_time
async def test_it_dials_again_at_once_and_says_how_it_was_taken() -> None:
    server = Server()
    caller = await calling(server, 1.2)
    assert server.queries == [{"seed": ["7"], "text_prompt": ["role"]}] * 3
    assert server.heard[2] > 0
    (redial,) = caller.redials
    assert redial.refusals == ["There is no room. (4+0 held, 0 free)"]
    assert redial.seconds == pytest.approx(0.1), "of pause after the refusal, and none before it"
    assert caller.up.is_set()


@in_virtual_time
async def test_one_that_is_never_answered_says_so() -> None:
    server = Server()
    server.queries.append({})
    caller = await calling(server, 0.3)
    assert (caller.failure, caller.redials) == ("There is no room.", [])

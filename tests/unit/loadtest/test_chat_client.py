"""The caller against a server of a few lines: what it sends, what it hears, and how it says that a call failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from loadtest.chat_client import Lost, Refused, hold_conversation, speak
from loadtest.chat_wire import ChatOptions, WireError
from loadtest.speech import RATE, Recording
from loadtest.timings import Timings

Handler = Callable[[ServerConnection], Awaitable[None]]

TONE = Recording.of("tone", (0.3 * np.sin(2 * np.pi * 300 * np.arange(3 * 1920 - 500) / RATE)).astype(np.float32))


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0, compression=None) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        yield f"http://{host}:{port}"


async def echo(connection: ServerConnection) -> None:
    """Says each frame back, with a word after the second."""
    await connection.send(b"\x00")
    await connection.send(b'\x04{"seed": 3}')
    frame = 0
    async for message in connection:
        assert isinstance(message, bytes)
        await connection.send(message)
        if frame == 1:
            await connection.send(b"\x02 hi")
        frame += 1


async def test_a_conversation_hears_as_much_as_it_said() -> None:
    heard: list[int] = []
    asked: list[str] = []

    async def handler(connection: ServerConnection) -> None:
        assert connection.request is not None
        asked.append(connection.request.path)
        asked.append(connection.request.headers.get("authorization", ""))
        await echo(connection)

    async with serving(handler) as server:
        options = ChatOptions(voice="A", seed=3, key="secret")
        conversation = await hold_conversation(server, TONE, options, on_frame=heard.append)
    assert asked == ["/api/chat?voice_prompt=A&seed=3", "Bearer secret"]
    assert len(conversation.agent) == len(TONE.pcm)
    assert np.sqrt(np.mean(conversation.agent**2)) > 0.1
    assert [(piece.start_s, piece.text) for piece in conversation.text] == [(0.08, " hi")]
    assert conversation.metadata == {"seed": 3}
    assert heard == [1, 2, 3]
    assert len(conversation.timings.heard_s) == 3


async def test_nobody_there_is_refused_with_the_address() -> None:
    async with serving(echo) as server:
        pass  # by now its port is closed
    with pytest.raises(Refused, match=server):
        await hold_conversation(server, TONE, ChatOptions())


async def test_no_room_is_refused_with_the_servers_sentence_and_code() -> None:
    async def full(connection: ServerConnection) -> None:
        await connection.send(b"\x05all 4 slots are taken")
        await connection.close(1013, "try again later")

    async with serving(full) as server:
        with pytest.raises(Refused, match="all 4 slots are taken") as refused:
            await hold_conversation(server, TONE, ChatOptions())
    assert refused.value.close_code == 1013


async def test_an_agent_that_is_never_ready_is_refused() -> None:
    async def mute(connection: ServerConnection) -> None:
        await connection.wait_closed()

    async with serving(mute) as server:
        with pytest.raises(Refused, match="not ready within"):
            await hold_conversation(server, TONE, ChatOptions(), ready_timeout_s=0.1)


async def test_a_socket_that_closes_in_the_middle_is_lost() -> None:
    async def hangs_up(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        await connection.recv()
        await connection.close(1011, "the engine died")

    async with serving(hangs_up) as server:
        with pytest.raises(Lost, match=r"1011.*the engine died") as lost:
            await hold_conversation(server, TONE, ChatOptions())
    assert lost.value.close_code == 1011


async def test_an_agent_that_falls_silent_is_lost() -> None:
    async def deaf(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        await connection.wait_closed()

    async with serving(deaf) as server:
        with pytest.raises(Lost, match="nothing came"):
            await hold_conversation(server, TONE, ChatOptions(), silence_timeout_s=0.1)


async def test_another_protocol_is_named_as_such() -> None:
    async def speaks_json(connection: ServerConnection) -> None:
        await connection.send('{"type": "hello"}')
        await connection.wait_closed()

    async with serving(speaks_json) as server:
        with pytest.raises(WireError, match="text frame"):
            await hold_conversation(server, TONE, ChatOptions())


async def test_cancelling_a_call_hangs_up() -> None:
    hung_up = asyncio.Event()
    started = asyncio.Event()

    async def listens(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        started.set()
        await connection.wait_closed()
        hung_up.set()

    async with serving(listens) as server:
        call = asyncio.create_task(hold_conversation(server, TONE, ChatOptions()))
        await started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(hung_up.wait(), 30)


class TestSpeaking:
    """With a clock that only moves when somebody sleeps, or is blocked."""

    @staticmethod
    async def spoken(oversleeps_s: dict[int, float], blocks_s: dict[int, float], frames: int) -> Timings:
        now_s, sleeps, sends = 100.0, 0, 0

        async def sleep(seconds: float) -> None:
            nonlocal now_s, sleeps
            now_s += seconds + oversleeps_s.get(sleeps, 0.0)
            sleeps += 1

        async def send(message: bytes) -> None:
            nonlocal now_s, sends
            assert message[0] == 1
            now_s += blocks_s.get(sends, 0.0)
            sends += 1

        timings = Timings(opened_s=99.0)
        timings.on_ready(100.0)
        await speak(send, [b"x"] * frames, timings, lambda: now_s, sleep)
        return timings

    async def test_frames_leave_when_a_microphone_would_have_them(self) -> None:
        timings = await self.spoken({}, {}, 4)
        assert timings.sent_s == pytest.approx([100.08, 100.16, 100.24, 100.32])
        assert timings.generator_lags_ms == pytest.approx([0, 0, 0, 0], abs=1e-6)

    async def test_waking_late_is_our_own_lag_and_is_caught_up(self) -> None:
        # Woken at 100.08 + 0.1: frame 1 was due at 100.16 and leaves at once, 20 ms late; frame 2 is on time again.
        timings = await self.spoken({0: 0.1}, {}, 4)
        assert timings.sent_s == pytest.approx([100.18, 100.18, 100.24, 100.32])
        assert timings.generator_lags_ms == pytest.approx([100, 20, 0, 0], abs=1e-6)

    async def test_a_server_that_does_not_read_is_not_our_lag(self) -> None:
        # The first frame is taken 0.2 s after it was sent: frames 1 and 2 leave at 100.28, frame 3 on its time.
        timings = await self.spoken({}, {0: 0.2}, 4)
        assert timings.sent_s == pytest.approx([100.08, 100.28, 100.28, 100.32])
        assert timings.generator_lags_ms == pytest.approx([0, 0, 0, 0], abs=1e-6)

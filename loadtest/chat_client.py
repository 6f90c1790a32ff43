"""A caller: one full-duplex conversation over /api/chat, asyncio, on an 80 ms clock of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sphn
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from loadtest.chat_wire import ChatOptions, Kind, Message, audio_message, chat_url, parse
from loadtest.speech import FRAME_S, FRAME_SAMPLES, RATE, Recording, Samples
from loadtest.timings import Timings

Send = Callable[[bytes], Awaitable[None]]

READY_TIMEOUT_S = 120.0
SILENCE_TIMEOUT_S = 20.0
CLOSE_GRACE_S = 2.0
HEARTBEAT_S = 20.0


class ChatFailed(Exception):
    """A conversation did not come about, or broke. The message is a sentence for the user.

    `close_code` is the WebSocket's, or the HTTP status where it never came to be one; None where nobody gave any.
    """

    def __init__(self, message: str, close_code: int | None = None) -> None:
        super().__init__(message)
        self.close_code = close_code


class Refused(ChatFailed):
    """The server would not take the call."""


class Lost(ChatFailed):
    """The call was up and ended before its time."""


@dataclass(frozen=True, slots=True)
class TimedText:
    """A piece of the agent's words, and where in its voice the frame begins that it came with."""

    start_s: float
    text: str


@dataclass
class Conversation:
    """What came of a call. `agent` [n] float32 is as long as the caller's recording."""

    timings: Timings
    metadata: dict[str, Any] = field(default_factory=dict)  # what the server said of the call, seed and model e.g.
    agent: Samples = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    text: list[TimedText] = field(default_factory=list)


async def hold_conversation(
    server: str,
    recording: Recording,
    options: ChatOptions,
    *,
    on_frame: Callable[[int], None] | None = None,
    ready_timeout_s: float = READY_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
    clock: Callable[[], float] = time.monotonic,
) -> Conversation:
    """Plays `recording` to the agent in real time and listens until as much has come back.

    `on_frame` is told how many frames of the agent have been heard. Raises what `converse` raises.
    """
    heard = Conversation(Timings(opened_s=clock()))
    timings = heard.timings
    reader = sphn.OpusStreamReader(RATE)
    parts: list[Samples] = []

    def take(message: Message) -> bool:
        if message.kind is Kind.METADATA:
            heard.metadata.update(message.metadata)
        elif message.kind is Kind.TEXT:
            # The server sends a frame's audio first, then its text.
            start = max(0, timings.heard_samples - FRAME_SAMPLES)
            heard.text.append(TimedText(start / RATE, message.text))
        elif message.kind is Kind.AUDIO:
            pcm = reader.append_bytes(message.payload)
            if len(pcm):
                parts.append(pcm)
                timings.on_heard(clock(), len(pcm))
                if on_frame is not None:
                    on_frame(min(len(timings.heard_s), recording.frames))
        return timings.heard_samples >= len(recording.pcm)

    await converse(
        server,
        options,
        timings,
        take,
        lambda send: speak(send, recording.ogg, timings, clock),
        ready_timeout_s=ready_timeout_s,
        silence_timeout_s=silence_timeout_s,
        clock=clock,
    )
    heard.agent = np.concatenate(parts)[: len(recording.pcm)]
    return heard


async def converse(
    server: str,
    options: ChatOptions,
    timings: Timings,
    take: Callable[[Message], bool],
    say: Callable[[Send], Awaitable[None]],
    *,
    ready_timeout_s: float = READY_TIMEOUT_S,
    silence_timeout_s: float = SILENCE_TIMEOUT_S,
    heartbeat_s: float = HEARTBEAT_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """One connection: `say` is run once the agent is ready, and `take` handed every message, until it answers True.

    The handshake is handed on as well. That the agent is ready goes into `timings` here; what is sent is up to `say`,
    what is heard up to `take`, which knows how much sound a payload holds. A line that does not echo a ping, sent every
    `heartbeat_s`, within as long again is lost. Raises Refused before the agent is ready,
    Lost after it, WireError when the server does not speak /api/chat, and ValueError for an address that is none.
    """
    url = chat_url(server, options)
    try:
        connection = await connect(
            url,
            additional_headers=options.headers,
            compression=None,
            max_size=2**20,
            open_timeout=ready_timeout_s,
            close_timeout=min(CLOSE_GRACE_S, heartbeat_s),
            ping_interval=heartbeat_s,
            ping_timeout=heartbeat_s,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        raise Refused(f"{server} did not take the call: it answered HTTP {status}", status) from error
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise Refused(f"{server} did not take the call: {error or type(error).__name__}") from error
    async with connection:
        await _until_ready(connection, timings, take, ready_timeout_s, clock)
        sender = asyncio.ensure_future(say(connection.send))
        try:
            await _listen(connection, take, silence_timeout_s)
        except asyncio.CancelledError:
            # We hang up, for whatever reason; leaving the block with an error would tell the server of a fault.
            await connection.close()
            raise
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


async def _until_ready(
    connection: ClientConnection,
    timings: Timings,
    take: Callable[[Message], bool],
    timeout_s: float,
    clock: Callable[[], float],
) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await _next(connection, Refused)
                if message.kind is Kind.HANDSHAKE:
                    timings.on_ready(clock())
                    take(message)
                    return
    except TimeoutError:
        raise Refused(f"the agent was not ready within {timeout_s:.0f} s") from None


async def speak(
    send: Send,
    spoken: Iterable[bytes],
    timings: Timings,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Sends frame k when a microphone would have it whole, k + 1 frames after the start.

    A frame is late by what this process took to wake up. The time that `send` was blocked by a server that does not
    read is the server's, and moves the frames behind it.
    """
    start_s = free_s = clock()
    for frame, payload in enumerate(spoken):
        due_s = start_s + (frame + 1) * FRAME_S
        await sleep(max(0.0, due_s - clock()))
        sent_s, due_s = clock(), max(due_s, free_s)
        timings.on_sent(sent_s, due_s)
        await send(audio_message(payload))
        free_s = due_s + clock() - sent_s


async def _listen(connection: ClientConnection, take: Callable[[Message], bool], timeout_s: float) -> None:
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                message = await _next(connection, Lost)
        except TimeoutError:
            raise Lost(f"nothing came from the server for {timeout_s:.0f} s") from None
        if take(message):
            return


async def _next(connection: ClientConnection, failure: type[ChatFailed]) -> Message:
    """The next message; an error message or the socket's end is raised as `failure`."""
    try:
        message = parse(await connection.recv())
        if message.kind is not Kind.ERROR:
            return message
        # The close that follows says why in a code; a server that never closes is not waited for.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_GRACE_S):
                await connection.wait_closed()
        raise failure(message.text, connection.close_code)
    except ConnectionClosed as closed:
        code = closed.rcvd.code if closed.rcvd else None
        reason = closed.rcvd.reason if closed.rcvd and closed.rcvd.reason else "without a reason"
        raise failure(f"the server closed the connection ({code or 'no code'}): {reason}", code) from closed

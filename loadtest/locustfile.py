"""One Locust user is one caller: a full-duplex conversation over /api/chat, one recording long, then the next.

    locust -f loadtest/locustfile.py --host http://localhost:8998 --headless -u 4 -r 1 -t 60s

Reported as requests of type `chat`, in milliseconds: time to ready, time to first audio, frame gap (80 is the beat),
reply lag, and generator lag: how late this process was with its own 80 ms clock. Above some 50 users a process it
blurs every other figure; start more processes then (--processes).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import gevent
import sphn
from locust import User, task
from websocket import WebSocket, WebSocketException, create_connection

from loadtest.callers import CALLERS, Caller
from loadtest.chat_wire import ChatOptions, Kind, Message, WireError, audio_message, chat_url, parse
from loadtest.speech import FRAME_S, RATE, Recording
from loadtest.timings import OutOfOrder, Timings

READY_TIMEOUT_S = 120.0
SILENCE_TIMEOUT_S = 20.0

# PERSONAPLEX_SECONDS cuts the recordings, for shorter calls. Read once a process: encoding costs 1 ms a frame.
_SECONDS = float(os.environ.get("PERSONAPLEX_SECONDS", "inf"))
_RECORDINGS: list[tuple[Caller, Recording]] = [(caller, caller.recording(_SECONDS)) for caller in CALLERS]
_TURN: Iterator[int] = itertools.count()


class CallFailed(Exception):
    """The server ended the call, with a sentence or without."""


class ConversationUser(User):
    """PERSONAPLEX_KEY gives the API key, PERSONAPLEX_VOICE the voice (default: the server's)."""

    @task
    def hold_a_conversation(self) -> None:
        turn = next(_TURN)
        caller, recording = _RECORDINGS[turn % len(_RECORDINGS)]
        options = ChatOptions(
            voice=os.environ.get("PERSONAPLEX_VOICE", ""),
            role=caller.role,
            seed=turn,
            key=os.environ.get("PERSONAPLEX_KEY"),
        )
        timings = Timings(opened_s=time.monotonic())
        failure: Exception | None = None
        try:
            hold(chat_url(self.host or "http://localhost:8998", options), options, recording, timings)
        except (CallFailed, OutOfOrder, WireError, WebSocketException, OSError) as error:
            failure = error
        self._report(timings, failure)

    def _report(self, timings: Timings, failure: Exception | None) -> None:
        whole_ms = (time.monotonic() - timings.opened_s) * 1e3
        self._fire("conversation", whole_ms, failure)
        if timings.time_to_ready_s is not None:
            self._fire("time to ready", timings.time_to_ready_s * 1e3)
        if timings.time_to_first_audio_s is not None:
            self._fire("time to first audio", timings.time_to_first_audio_s * 1e3)
        for name, values in (
            ("frame gap", timings.frame_gaps_ms),
            ("reply lag", timings.reply_lags_ms),
            ("generator lag", timings.generator_lags_ms),
        ):
            for value in values:
                self._fire(name, value)

    def _fire(self, name: str, milliseconds: float, failure: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="chat",
            name=name,
            response_time=milliseconds,
            response_length=0,
            exception=failure,
            context={},
        )


def hold(url: str, options: ChatOptions, recording: Recording, timings: Timings) -> None:
    """One call from hello to hang-up. Raises CallFailed, WireError, WebSocketException or OSError."""
    header = [f"{name}: {value}" for name, value in options.headers.items()]
    socket = create_connection(url, timeout=READY_TIMEOUT_S, header=header)
    try:
        while _next(socket).kind is not Kind.HANDSHAKE:
            pass
        timings.on_ready(time.monotonic())
        socket.settimeout(SILENCE_TIMEOUT_S)
        sender = gevent.spawn(_speak, socket, recording, timings)
        try:
            _listen(socket, recording, timings)
        finally:
            sender.kill()
    finally:
        socket.close(timeout=1)


def _speak(socket: WebSocket, recording: Recording, timings: Timings) -> None:
    start_s = time.monotonic()
    for frame, ogg in enumerate(recording.ogg):
        due_s = start_s + (frame + 1) * FRAME_S
        gevent.sleep(max(0.0, due_s - time.monotonic()))
        try:
            socket.send_binary(audio_message(ogg))
        except (WebSocketException, OSError):
            return  # the listener sees the same end, and says why
        timings.on_sent(time.monotonic(), due_s)


def _listen(socket: WebSocket, recording: Recording, timings: Timings) -> None:
    reader = sphn.OpusStreamReader(RATE)
    while timings.heard_samples < len(recording.pcm):
        message = _next(socket)
        if message.kind is Kind.AUDIO:
            samples = len(reader.append_bytes(message.payload))
            if samples:
                timings.on_heard(time.monotonic(), samples)


def _next(socket: WebSocket) -> Message:
    content = socket.recv()
    if not content:
        raise CallFailed("the server closed the connection")
    message = parse(content)
    if message.kind is Kind.ERROR:
        raise CallFailed(message.text)
    return message

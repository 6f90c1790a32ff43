"""Holds an item's conversation with a server over /api/chat, in real time, and keeps what was said when.

Everything is kept on the caller's clock: user frame k lasts from 0.08 k seconds on, and the agent is heard when its
frames arrive. So the scores include the network's and the server's delay, as a caller would feel them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import sphn

from evaluation.duplex.items import NOISE, USER_AUDIO, Item, read_item, write_json
from evaluation.duplex.recording import CONVERSATION, RECORDING, Recording
from evaluation.duplex.user import FRAME_S, FRAME_SAMPLES, RATE, Samples, ScriptedUser
from loadtest.chat_client import Refused, converse, speak
from loadtest.chat_wire import ChatOptions, Kind, Message
from loadtest.timings import Timings

LAG_MOVES_S = 0.25  # more than that, and "600 ms after" is no time anybody experienced
STALLED_MOST = 0.25  # of a call; beyond it, the rest was hardly a conversation
_KEPT = ("lm_model_file", "trained", "notice", "voice", "seed", "session", "instance_name")
_LAG_WINDOW = 25  # frames of which the median is one lag: a single late frame is jitter
_BUSY, _BUSY_TRIES, _BUSY_WAIT_S = 1013, 30, 2.0  # a call has to end, or a replica that is late to catch up


class NotLive(Exception):
    """The conversation was not in real time, so that nothing can be measured on it. The message says how far off."""


async def record(
    server: str,
    folder: Path,
    *,
    key: str | None = None,
    on_second: Callable[[float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Recording:
    """Holds the conversation of an item's folder and writes conversation.flac (user left, agent right) into it.

    Raises ItemError, NotLive, and what `loadtest.chat_client.converse` raises.
    """
    item = read_item(folder)
    options = ChatOptions(item.voice, item.prompt, item.seed, key)
    for attempt in range(_BUSY_TRIES):
        try:
            call = await _hold(server, options, _Call(item, folder, on_second, clock), clock)
            break
        except Refused as error:
            if error.close_code != _BUSY or attempt == _BUSY_TRIES - 1:
                raise
            await asyncio.sleep(_BUSY_WAIT_S)
    return await asyncio.to_thread(call.write, folder)


async def _hold(server: str, options: ChatOptions, call: _Call, clock: Callable[[], float]) -> _Call:
    await converse(
        server,
        options,
        call.timings,
        call.take,
        lambda send: speak(send, call.microphone(), call.timings, clock),
        clock=clock,
    )
    return call


class _Call:
    """One conversation under way: the user's side, and what has come back."""

    def __init__(
        self, item: Item, folder: Path, on_second: Callable[[float], None] | None, clock: Callable[[], float]
    ) -> None:
        noise = _read(folder / NOISE) if item.noise else None
        self.timings = Timings(opened_s=clock())
        self._clock = clock
        self._user = ScriptedUser(item, _read(folder / USER_AUDIO), noise)
        self._on_second = on_second
        self._reader = sphn.OpusStreamReader(RATE)
        self._writer = sphn.OpusStreamWriter(RATE)
        self._said: list[Samples] = []
        self._heard: list[Samples] = []
        self._text: list[tuple[float, str]] = []
        self._metadata: dict[str, Any] = {}

    def microphone(self) -> Iterator[bytes]:
        """The user's next frame, decided on at the moment it is asked for."""
        while not self._user.done:
            self._said.append(self._user.frame())
            if self._on_second is not None:
                self._on_second(self._user.now_s)
            yield bytes(self._writer.append_pcm(self._said[-1]))

    def take(self, message: Message) -> bool:
        """True when the user has hung up."""
        if message.kind is Kind.METADATA:
            self._metadata.update({name: message.metadata[name] for name in _KEPT if name in message.metadata})
        elif message.kind is Kind.TEXT:
            # The server sends a frame's audio first, then its text.
            self._text.append((max(0, self.timings.heard_samples - FRAME_SAMPLES) / RATE, message.text))
        elif message.kind is Kind.AUDIO:
            pcm = self._reader.append_bytes(message.payload)
            if len(pcm):
                self._heard.append(pcm)
                self._user.hear(pcm)
                self.timings.on_heard(self._clock(), len(pcm))
        return self._user.done

    def write(self, folder: Path) -> Recording:
        """Raises NotLive."""
        lag_s, stalls = lag(self.timings.due_s, self.timings.heard_s)
        stalled_s = sum(end_s - start_s for start_s, end_s in stalls)
        if stalled_s > STALLED_MOST * len(self._said) * FRAME_S:
            raise NotLive(
                f"it stalled for {stalled_s:.0f} of {len(self._said) * FRAME_S:.0f} s: this machine or the server "
                "is too slow for so many sessions at once; run again with fewer --sessions"
            )
        user, agent = np.concatenate(self._said), np.concatenate(self._heard)
        shift = round(lag_s * RATE)
        stereo = np.zeros((len(user), 2), dtype=np.float32)
        stereo[:, 0] = user
        stereo[shift : shift + len(agent), 1] = agent[: max(0, len(user) - shift)]
        soundfile.write(folder / CONVERSATION, stereo, RATE, subtype="PCM_16")
        recording = Recording(
            spoken=tuple(self._user.log),
            text=tuple((round(start_s + lag_s, 3), text) for start_s, text in self._text),
            seconds=round(len(user) / RATE, 3),
            lag_s=round(lag_s, 3),
            stalls=tuple((round(start_s, 3), round(end_s, 3)) for start_s, end_s in stalls),
            metadata=self._metadata,
        )
        write_json(folder / RECORDING, recording.to_json())  # last: where it is, the sound is whole
        return recording


def lag(due_s: Sequence[float], heard_s: Sequence[float]) -> tuple[float, list[tuple[float, float]]]:
    """The median lag of the agent's frames behind the user's; and when a call of that lag stalled, from and to.

    due_s: when user frame k was spoken to its end; heard_s: when agent frame k had arrived. A stall is where the median
    of a window is LAG_MOVES_S away from that of all, the windows' width included. Raises NotLive on none.
    """
    lags = [heard - due + FRAME_S for due, heard in zip(due_s, heard_s, strict=False)]
    if not lags:
        raise NotLive("nothing was heard of the agent")
    median = statistics.median(lags)
    stalls: list[tuple[float, float]] = []
    for start in range(max(1, len(lags) - _LAG_WINDOW + 1)):
        window = lags[start : start + _LAG_WINDOW]
        if abs(statistics.median(window) - median) <= LAG_MOVES_S:
            continue
        span = (start * FRAME_S, (start + len(window)) * FRAME_S)
        if stalls and span[0] <= stalls[-1][1]:
            stalls[-1] = (stalls[-1][0], span[1])
        else:
            stalls.append(span)
    return median, stalls


def _read(path: Path) -> Samples:
    """[n] float32. Raises ValueError if it is not 24 kHz mono."""
    sound, rate = soundfile.read(path, dtype="float32")
    if rate != RATE or sound.ndim != 1:
        raise ValueError(f"{path} is not mono at {RATE} Hz")
    mono: Samples = sound
    return mono

"""A caller who counts: raw PCM both ways, every frame of the model by its number, and a way back after a cut.

With `resume=1` the server sends exactly one audio message for each frame of the model, an empty one where its sound
was trimmed to catch up, and says on every connection which frame comes first. So a frame that was lost or doubled
shows here as a number, not as a guess.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.chat_client import READY_TIMEOUT_S, Lost, Refused, Send, converse
from loadtest.chat_wire import ChatOptions, Kind, Message, audio_message
from loadtest.speech import FRAME_S, Samples, in_frames, to_int16
from loadtest.timings import Timings

GRACE_S = 30.0  # how long a server keeps the slot of a client that may come back
# A call that has said and heard everything stays on the line until what was struck last is mended. (One that hears
# nothing while it talks has long failed by then; a line that is dead is noticed by its heartbeat.)
_SILENCE_S = 600.0
_AGAIN_S = 0.1
HEARTBEAT_S = 1.0  # a server that is cut off closes no connection; only its silence tells
_RESUME_S = 3.0  # a server that does not answer an attempt within this may be the one that has just died


@dataclass(frozen=True, slots=True)
class Heard:
    """A model frame as it came: a hash of its samples, None where they had been trimmed."""

    frame: int
    at_s: float
    digest: str | None


@dataclass
class CallLog:
    """All that one caller saw, at which times of our clock."""

    call: int
    seed: int
    session: str = ""
    ready_s: float | None = None
    spoken_s: list[float] = field(default_factory=list)  # when each of their own frames first left
    heard: list[Heard] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    told_s: list[float] = field(default_factory=list)  # when each of these came: the line was up
    cuts: list[tuple[float, str]] = field(default_factory=list)  # when and how each connection but the last ended
    failure: str | None = None  # why the call did not last

    @property
    def text(self) -> str:
        return "".join(self.words)


class Caller:
    """Says `frames` frames of a recording, over and over, and listens until each has been answered; then holds the
    line until `hold` is cancelled, so that the conversation can still be looked at."""

    def __init__(
        self,
        server: str,
        call: int,
        seed: int,
        speech: Samples,
        frames: int,
        role: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.log = CallLog(call, seed)
        self.over = asyncio.Event()  # answered in full, or failed
        self._server = server
        self._frames = frames
        self._role = role
        self._clock = clock
        self._pcm = [frame.astype("<i2").tobytes() for frame in map(to_int16, in_frames(speech))]
        self._token: str | None = None
        self._start_s: float | None = None  # when our first frame began; the microphone runs on whatever the line does
        self._next = 0  # the number of the model frame that the next audio message is
        self._wanted = 0  # our own frame that the server wants next
        self._told = asyncio.Event()  # the server has said what it wants, on this connection

    @property
    def token(self) -> bool:
        """Whether the server lets us come back."""
        return self._token is not None

    async def hold(self) -> None:
        """The whole call, with as many connections as it takes. What goes wrong is in the log."""
        given_up_s = self._clock() + GRACE_S
        try:
            while True:
                try:
                    await self._connect()
                except (Refused, Lost) as failure:
                    if self._token is None or self.over.is_set():
                        raise
                    if isinstance(failure, Lost):
                        given_up_s = self._clock() + GRACE_S
                    elif self._clock() > given_up_s:
                        raise
                    self.log.cuts.append((self._clock(), str(failure)))
                    await asyncio.sleep(_AGAIN_S)
        except Exception as failure:  # noqa: BLE001 - a witness reports, whatever it was
            if not self.over.is_set():
                self.log.failure = f"{type(failure).__name__}: {failure}"
        finally:
            self.over.set()

    async def _connect(self) -> None:
        self._told.clear()
        if self._token is None:
            options = ChatOptions(role=self._role, seed=self.log.seed, query={"audio": "pcm", "resume": "1"})
        else:
            back = {"resume": self._token, "missed": "replay", "have": str(self._next)}
            options = ChatOptions(query={"audio": "pcm", **back})
        await converse(
            self._server,
            options,
            Timings(opened_s=self._clock()),
            self._take,
            self._say,
            ready_timeout_s=READY_TIMEOUT_S if self._token is None else _RESUME_S,
            silence_timeout_s=_SILENCE_S,
            heartbeat_s=HEARTBEAT_S,
            clock=self._clock,
        )

    async def _say(self, send: Send) -> None:
        """From the frame that the server wants; what it missed leaves at once, the rest when a microphone has it."""
        await self._told.wait()
        if self._start_s is None:
            self._start_s = self._clock()
        for frame in range(self._wanted, self._frames):
            due_s = self._start_s + (frame + 1) * FRAME_S
            await asyncio.sleep(max(0.0, due_s - self._clock()))
            if frame == len(self.log.spoken_s):  # not when it is said again
                self.log.spoken_s.append(self._clock())
            await send(audio_message(self._pcm[frame % len(self._pcm)]))

    def _take(self, message: Message) -> bool:
        now_s = self._clock()
        if message.kind is Kind.METADATA:
            self._listen_to(dict(message.metadata), now_s)
        elif message.kind is Kind.TEXT:
            self.log.words.append(message.text)
        elif message.kind is Kind.AUDIO:
            sound = message.payload
            digest = hashlib.blake2b(sound, digest_size=8).hexdigest() if sound else None
            self.log.heard.append(Heard(self._next, now_s, digest))
            self._next += 1
            if self._next >= self._frames:
                self.over.set()
        return False

    def _listen_to(self, metadata: dict[str, Any], now_s: float) -> None:
        self.log.metadata.append(metadata)
        self.log.told_s.append(now_s)
        if self.log.ready_s is None:
            self.log.ready_s = now_s
        if "session" in metadata:
            self.log.session = str(metadata["session"])
        if "resume_token" in metadata:
            self._token = str(metadata["resume_token"])
        self._next = int(metadata.get("first_frame", self._next))
        # A server that does not say what it has heard has missed what was said while the line was dead.
        self._wanted = int(metadata.get("heard_frames", len(self.log.spoken_s)))
        self._told.set()

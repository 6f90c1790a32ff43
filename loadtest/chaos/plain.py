"""An unmodified client: the published protocol, Opus, no token. A call that is lost is over for it; it dials anew."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from loadtest.chat_client import Lost, Refused, converse, speak
from loadtest.chat_wire import ChatOptions, Kind, Message
from loadtest.speech import EndlessSpeech, Samples
from loadtest.timings import Timings

_AGAIN_S = 0.1
_READY_S = 30.0


@dataclass
class Redial:
    """What came after a lost connection. `ready_s`: when the next one's agent was ready; None: never."""

    lost_s: float
    how: str
    refusals: list[str] = field(default_factory=list)
    ready_s: float | None = None

    @property
    def seconds(self) -> float | None:
        return None if self.ready_s is None else self.ready_s - self.lost_s

    def __str__(self) -> str:
        took = "never had another" if self.seconds is None else f"talked again after {self.seconds:.2f} s"
        refused = f", refused {len(self.refusals)} times: {self.refusals[-1]}" if self.refusals else ""
        return f"lost its line ({self.how}), {took}{refused}"

    def as_json(self) -> dict[str, Any]:
        seconds = None if self.seconds is None else round(self.seconds, 3)
        return {"how": self.how, "seconds": seconds, "refusals": self.refusals}


class PlainCaller:
    """Talks until `hold` is cancelled, in as many calls as it takes."""

    def __init__(
        self,
        server: str,
        seed: int,
        speech: Samples,
        role: str = "",
        clock: Callable[[], float] = time.monotonic,
        rooms: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        """`rooms`: what the system says of its slots, asked for and noted with every refusal."""
        self._rooms = rooms
        self.redials: list[Redial] = []
        self.up = asyncio.Event()  # it is talking now
        self.failure: str | None = None  # it was never answered at all
        self._server = server
        self._options = ChatOptions(role=role, seed=seed)
        self._speech = EndlessSpeech(speech)
        self._clock = clock

    async def hold(self) -> None:
        while True:
            timings = Timings(opened_s=self._clock())
            try:
                await converse(
                    self._server,
                    self._options,
                    timings,
                    self._take,
                    lambda send, timings=timings: speak(send, self._speech.chunks(), timings, self._clock),  # type: ignore[misc]
                    ready_timeout_s=_READY_S,
                    clock=self._clock,
                )
            except Refused as error:
                if not self.redials:
                    self.failure = str(error)
                    return
                told = "" if self._rooms is None else f" ({await self._rooms()})"
                self.redials[-1].refusals.append(f"{error}{told}")
                await asyncio.sleep(_AGAIN_S)
            except Lost as error:
                self.up.clear()
                self.redials.append(Redial(self._clock(), str(error)))

    def _take(self, message: Message) -> bool:
        if message.kind is Kind.HANDSHAKE:
            self.up.set()
            if self.redials:
                self.redials[-1].ready_s = self._clock()
        return False

"""One conversation as its replica sees it: numbering, bounds, answers to replay, its journal."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import numpy as np

from actors.errors import BadRequest, ServingError
from actors.flight import Flight
from actors.journal import Journal
from actors.messages import DownSink, FrameIn, FrameOut, Need, OpenRequest, Ready, SlotReport
from actors.slots import SlotLease
from graphs.stages import PromptInfo

FRAME_SAMPLES = 1920
ANSWERS_KEPT = 25  # 2 s, as in the stages' gates


class Call:
    """Plain bookkeeping, no I/O but `tell`. Compared by identity: two epochs of a session are two calls."""

    def __init__(self, request: OpenRequest, sink: DownSink, lease: SlotLease, journal: Journal, now_s: float) -> None:
        self.request = request
        self.sink = sink
        self.lease = lease
        self.journal = journal
        self.asked_s = now_s
        self.opening: asyncio.Task[None] | None = None
        self.prompt: PromptInfo | None = None  # set when the stages have opened
        self.primed = False  # the engine has said that the prompt is in the cache
        self.ready: Ready | None = None  # what was told, once both of the above hold
        self.closed = False
        self.failure: ServingError | None = None  # why, if it was not its owner's wish
        self.ending: asyncio.Task[None] | None = None  # frees the slot
        self.next_in = 0
        self.in_flight = 0
        self.last_in_s: float | None = None
        self.misses = 0
        self.early: deque[Flight] = deque()  # frames that came before Ready
        self._answers: deque[FrameOut] = deque(maxlen=ANSWERS_KEPT)

    @property
    def session(self) -> str:
        return self.request.session

    @property
    def epoch(self) -> int:
        return self.request.epoch

    @property
    def prefilling(self) -> bool:
        return self.prompt is not None and not self.primed and not self.closed

    def accept(
        self, frame: FrameIn, bound: int, now_s: float, tell: Callable[[FrameOut | Need], None]
    ) -> Flight | None:
        """Takes the next frame in, or tells why not: what was answered is answered again, what is under way is
        left under way, what is too early or too much gets Need with the frame that is due.

        Raises BadRequest for PCM that is not [1920] int16.
        """
        if frame.pcm.shape != (FRAME_SAMPLES,) or frame.pcm.dtype != np.int16:
            raise BadRequest(f"A frame is {FRAME_SAMPLES} samples of 16 bit, not {frame.pcm.shape} {frame.pcm.dtype}.")
        number = frame.key.frame
        if number < self.next_in:
            for answer in self._answers:
                if answer.key.frame == number:
                    tell(answer)
            return None
        if number > self.next_in or self.in_flight >= bound:
            tell(Need(frame.key, self.next_in))
            return None
        self.journal.heard(number, frame.pcm)
        self.next_in += 1
        self.in_flight += 1
        self.last_in_s = now_s
        return Flight(self, frame.key, frame.pcm.copy(), now_s)

    def answered(self, out: FrameOut) -> None:
        """Notes an answer, in the journal and for those who ask again."""
        self.journal.take(out)
        self._answers.append(out)
        self.in_flight -= 1

    def report(self) -> SlotReport:
        return SlotReport(self.session, self.epoch, self.request.tenant, self.lease.slot, self.request.ingress)

"""One conversation as its replica sees it: numbering, bounds, answers to replay, its journal, and whose it is."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from actors.errors import BadRequest, ServingError
from actors.flight import Flight
from actors.journal import Journal
from actors.messages import Down, DownSink, FrameIn, FrameOut, Need, OpenRequest, Ready, SlotReport
from actors.slots import SlotLease
from graphs.stages import FrameKey, PromptInfo

FRAME_SAMPLES = 1920
ANSWERS_KEPT = 25  # 2 s, as in the stages' gates
CALM_S = 0.04  # half a frame's time between two frames: they are not sent in a burst


def nobody(message: Down) -> None:
    """The sink of a conversation whose trunk was lost: what it says is in its journal, and is heard by whoever resumes
    it."""


class Call:
    """Plain bookkeeping, no I/O but `tell`. Compared by identity: a session that comes back is another call.

    It may change hands without its state moving: `epoch` is that of its present owner, `tenancy` the one it was opened
    under, and the one that the stages know it by.
    """

    def __init__(self, request: OpenRequest, sink: DownSink, lease: SlotLease, journal: Journal, now_s: float) -> None:
        self.request = request
        self.sink = sink
        self.lease = lease
        self.journal = journal
        self.tenancy = request.epoch
        self.continued = journal.next_frame > 0  # it is rebuilt from a journal
        # False as long as the frames that were heard meanwhile come in bursts, each of them late before it is here.
        self.caught_up = not self.continued
        self.exact = True  # as far as is known, its bits are those it would have had elsewhere
        self.asked_s = now_s
        self.orphaned_s: float | None = None  # since when it has had no trunk
        self.wants_journal = False  # its owner resumes it, and gets the journal before Ready
        self.opening: asyncio.Task[None] | None = None
        self.prompt: PromptInfo | None = None  # set when the stages have opened
        self.primed = False  # the engine has said that the prompt is in the cache
        self.rebuilding: set[str] = set()  # codec stages that are not where they were
        self.ready: Ready | None = None  # what was told, once all of the above hold
        self.closed = False
        self.failure: ServingError | None = None  # why, if it was not its owner's wish
        self.ending: asyncio.Task[None] | None = None  # frees the slot
        self.next_in = journal.next_frame
        self.in_flight = 0
        self.last_in_s: float | None = None
        self.early: deque[Flight] = deque()  # frames that came before Ready
        self.held: list[Flight] = []  # frames that the engine has no memory for until it names the call ready again
        self._answers: deque[FrameOut] = deque(maxlen=ANSWERS_KEPT)

    @property
    def session(self) -> str:
        return self.request.session

    @property
    def epoch(self) -> int:
        return self.request.epoch

    @property
    def orphan(self) -> bool:
        return self.orphaned_s is not None

    @property
    def prefilling(self) -> bool:
        return self.prompt is not None and not self.primed and not self.closed

    def rebuilds_in(self, stage: str) -> bool:
        """Whether a codec stage has work to do on its past."""
        return self.prompt is not None and stage in self.rebuilding and not self.closed

    def owned_by(self, request: OpenRequest, sink: DownSink) -> None:
        """Hands it to whoever asks now. What identifies the conversation stays as it was."""
        self.request = replace(
            self.request,
            epoch=request.epoch,
            ingress=request.ingress,
            resumable=request.resumable,
            serial=request.serial,
        )
        self.sink, self.orphaned_s = sink, None
        self.caught_up, self.last_in_s = False, None  # what was said meanwhile comes in a burst

    def orphaned(self, now_s: float) -> None:
        """Its trunk is lost; it waits to be resumed."""
        self.sink, self.orphaned_s = nobody, now_s

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
                    tell(replace(answer, key=self.key(number)))
            return None
        if number > self.next_in or self.in_flight >= bound:
            tell(Need(frame.key, self.next_in))
            return None
        if self.in_flight == 0 and self.last_in_s is not None and now_s - self.last_in_s >= CALM_S:
            self.caught_up = True
        self.journal.heard(number, frame.pcm)
        self.next_in += 1
        self.in_flight += 1
        self.last_in_s = now_s
        return Flight(self, FrameKey(self.session, self.tenancy, number), frame.pcm.copy(), now_s)

    def key(self, frame: int) -> FrameKey:
        """A frame's name to the present owner."""
        return FrameKey(self.session, self.epoch, frame)

    def answered(self, out: FrameOut) -> None:
        """Notes an answer, in the journal and for those who ask again."""
        self.journal.take(out)
        self._answers.append(out)
        self.in_flight -= 1

    def report(self) -> SlotReport:
        asked, live = self.request, self.ready is not None
        return SlotReport(
            asked.session, asked.epoch, asked.tenant, self.lease.slot, asked.ingress, asked.serial, live, self.orphan
        )

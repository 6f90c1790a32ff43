"""One replica and the trunk to it, without a model, for tests of what is around it.

It computes nothing, but it depends on its past as a model does: a frame's tokens are a hash of the seed and of every
row before them, so a conversation that was rebuilt from a wrong journal, or fed a wrong frame, says other words than
one that was left alone. Messages wait in both directions until a test lets them pass.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from actors.errors import ReplicaLost
from actors.journal import Journal
from actors.journal_parts import PartsBin, cut
from actors.messages import (
    CloseRequest,
    Down,
    DownSink,
    Failed,
    FrameIn,
    FrameOut,
    JournalAsk,
    JournalPart,
    Move,
    Need,
    OpenRequest,
    Ready,
    Up,
)
from graphs.stages import FrameKey, Pcm, SessionSpec

SPEC = SessionSpec("voice", "role", 7)
KEPT_ANSWERS = 25


def spoken(frame: int) -> Pcm:
    """What the user says in a frame."""
    return np.full(1920, frame * 7 + 1, dtype=np.int16)


class Model:
    """A conversation's state: a hash of its seed and rows."""

    def __init__(self, spec: SessionSpec, numerics: str = "n") -> None:
        self.state = zlib.crc32(f"{spec.seed}{spec.role}{numerics}".encode())
        self.column = np.zeros(9, dtype=np.int16)  # what the next row begins with

    def read(self, row: np.ndarray) -> None:
        """row: [17] int16"""
        self.state = zlib.crc32(row.tobytes(), self.state)
        self.column = ((self.state >> np.arange(9)) % 2000).astype(np.int16)

    def step(self, key: FrameKey, pcm: Pcm) -> FrameOut:
        user = (pcm[:8] + np.arange(8, dtype=np.int16)).astype(np.int16)
        row = np.concatenate([self.column, user])
        self.read(row)
        begun = np.concatenate([self.column, np.full(8, -2, dtype=np.int16)])
        text, codes = int(self.column[0]), self.column[1:].copy()
        return FrameOut(key, pcm + np.int16(1), text, f" {text}", codes, user, row, 20.0, begun)


def undisturbed(frames: int, spec: SessionSpec = SPEC) -> list[int]:
    """The text tokens of a conversation that nothing happened to."""
    model = Model(spec)
    return [model.step(FrameKey("", 0, frame), spoken(frame)).text_token for frame in range(frames)]


@dataclass
class Slot:
    request: OpenRequest
    epoch: int
    sink: DownSink | None
    model: Model
    journal: Journal
    answers: deque[FrameOut] = field(default_factory=lambda: deque(maxlen=KEPT_ANSWERS))


class FakeReplica:
    """One replica and the trunk to it."""

    def __init__(self, name: str, slots: int = 4, version: int = 2, numerics: str = "n") -> None:
        self.name = name
        self.slots = slots
        self.version = version
        self.numerics = numerics
        self.alive = True
        self.inbox: deque[Up] = deque()
        self.outbox: deque[tuple[tuple[str, int], Down]] = deque()
        self.held: dict[str, Slot] = {}
        self.sinks: dict[tuple[str, int], DownSink] = {}
        self.parts = PartsBin()
        self.opened: list[OpenRequest] = []
        self.deceives = False  # computes other tokens than it should
        self.stuck = False  # takes conversations, and computes none of their frames
        self.uncomputed: deque[FrameIn] = deque()
        self.delivered: list[tuple[DownSink, Down]] = []  # for tests that say things twice

    # The trunk

    def attach(self, session: str, epoch: int, sink: DownSink) -> None:
        self._check()
        self.sinks[session, epoch] = sink

    def detach(self, session: str, epoch: int) -> None:
        self.sinks.pop((session, epoch), None)

    async def send(self, message: Up) -> None:
        await asyncio.sleep(0)
        self.send_nowait(message)

    def send_nowait(self, message: Up) -> None:
        self._check()
        self.inbox.append(message)

    def _check(self) -> None:
        if not self.alive:
            raise ReplicaLost("gone")

    # What tests do to it

    def die(self) -> None:
        """Its process is gone, and with it all state."""
        self.alive = False
        self.inbox.clear()
        self.uncomputed.clear()
        self.outbox.clear()
        self.held.clear()
        sinks, self.sinks = self.sinks, {}
        for (session, epoch), sink in sinks.items():
            sink(Failed(session, epoch, "replica_lost", "It died."))

    def lose_engine(self, code: str = "engine_lost") -> None:
        """All conversations end; the replica can take new ones."""
        for session, slot in list(self.held.items()):
            self._tell(slot, Failed(session, slot.epoch, code, "It died."))
        self.held.clear()

    def ask_to_move(self) -> None:
        for session, slot in self.held.items():
            self._tell(slot, Move(session, slot.epoch, "drain"))

    def work(self, messages: int = 10_000) -> None:
        while self.uncomputed and not self.stuck:
            self._take(self.uncomputed.popleft())
        for _ in range(min(messages, len(self.inbox))):
            message = self.inbox.popleft()
            if self.stuck and isinstance(message, FrameIn):
                self.uncomputed.append(message)
            else:
                self._take(message)

    def flush(self, messages: int = 10_000) -> None:
        for _ in range(min(messages, len(self.outbox))):
            owner, message = self.outbox.popleft()
            if (sink := self.sinks.get(owner)) is not None:
                self.delivered.append((sink, message))
                sink(message)

    # What it does

    def _take(self, message: Up) -> None:
        match message:
            case JournalPart():
                self.parts.add(message, 0.0)
            case OpenRequest():
                self._open(message)
            case FrameIn():
                self._frame(message)
            case CloseRequest(session=session, epoch=epoch):
                slot = self.held.get(session)
                if slot is not None and slot.epoch <= epoch:
                    del self.held[session]
            case JournalAsk(session=session, epoch=epoch):
                slot = self.held.get(session)
                answer: list[Down] = [Failed(session, epoch, "unknown_session", "Not here.")]
                if slot is not None:
                    answer = list(cut(session, epoch, slot.journal.to_bytes()))
                self.outbox.extend(((session, epoch), part) for part in answer)

    def _open(self, request: OpenRequest) -> None:
        key, known = (request.session, request.epoch), self.held.get(request.session)
        if request.adopt:
            if known is None:
                self.outbox.append((key, Failed(*key, "unknown_session", "Not here.")))
                return
            self._tell(known, Failed(known.request.session, known.epoch, "stale_epoch", "Taken over."))
            known.epoch, known.request = request.epoch, request
            self.outbox.extend((key, part) for part in cut(*key, known.journal.to_bytes()))
            self._ready(known)
            return
        if known is not None and known.epoch >= request.epoch:
            self.outbox.append((key, Failed(*key, "stale_epoch", "Older than what is here.")))
            return
        if len(self.held) >= self.slots:
            self.outbox.append((key, Failed(*key, "no_capacity", "Full.")))
            return
        self.opened.append(request)
        journal, model = Journal(request.session, request.spec), Model(request.spec, self.numerics)
        if request.journal_bytes:
            blob = self.parts.take(*key)
            assert len(blob) == request.journal_bytes
            journal = Journal.from_bytes(blob)
            assert journal.spec == request.spec
            assert journal.heard_frames == journal.next_frame, "what was heard since follows as frames"
            for row in journal.rows.array():
                model.read(row)
        if self.deceives:
            model.state ^= 1
        slot = self.held[request.session] = Slot(request, request.epoch, None, model, journal)
        self._ready(slot)

    def _ready(self, slot: Slot) -> None:
        exact = slot.journal.numerics_id in ("", self.numerics)
        next_frame = slot.journal.next_frame
        ready = Ready(slot.request.session, slot.epoch, 0, 30, "hash", 1.0, self.numerics, next_frame, exact)
        self._tell(slot, ready)
        slot.journal.begin("hash", 30, self.numerics)

    def _frame(self, frame: FrameIn) -> None:
        session, epoch, number = frame.key
        slot = self.held.get(session)
        if slot is None or slot.epoch != epoch:
            code = "unknown_session" if slot is None or slot.epoch < epoch else "stale_epoch"
            self.outbox.append(((session, epoch), Failed(session, epoch, code, "Not here.")))
        elif number > slot.journal.next_frame:
            self._tell(slot, Need(frame.key, slot.journal.next_frame))
        elif number < slot.journal.next_frame:
            for answer in slot.answers:
                if answer.key.frame == number:
                    self._tell(slot, answer)
        else:
            slot.journal.heard(number, frame.pcm)
            answer = slot.model.step(frame.key, frame.pcm)
            slot.journal.take(answer)
            slot.answers.append(answer)
            self._tell(slot, answer)

    def _tell(self, slot: Slot, message: Down) -> None:
        self.outbox.append(((slot.request.session, slot.epoch), message))

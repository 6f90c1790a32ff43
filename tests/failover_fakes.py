"""Replicas that die, a router that counts, and a clock that a test moves, around the real ConversationHub.

A replica here computes no model, but it depends on its past as one does: a frame's tokens are a hash of the seed and of
every row before them, so a conversation that was rebuilt from a wrong journal, or fed a wrong frame, says other words
than one that was left alone. Messages wait in both directions until a test lets them pass.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from actors.errors import NoCapacity, ReplicaLost, StaleEpoch, UnknownReplica, UnknownSession
from actors.interfaces import MonotonicClock
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
from serving.routing import AcquireRequest, Grant, ReplicaView, ResumeRequest
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.tenants import Tenant
from tests.actor_fakes import FakeClock, settle

SPEC = SessionSpec("voice", "role", 7)
TENANT = Tenant("acme", 3)
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


@dataclass
class Lease:
    epoch: int
    replica: str
    owner: str
    serial: int = 0


class CountingRouter:
    """serving.routing.RouterPort for one ingress, strict about who holds what."""

    def __init__(self, replicas: dict[str, FakeReplica], ingress: str) -> None:
        self.replicas_by_name = replicas
        self.ingress = ingress
        self.leases: dict[str, Lease] = {}
        self.pending: dict[str, Lease] = {}
        self.highest: dict[str, int] = {}
        self.unspent: list[str] = []  # sessions
        self.nodes: dict[str, str] = {}  # replica → node, where it matters
        self.requests: list[AcquireRequest] = []
        self.looks = 0  # at all replicas
        self.away = False
        self.commits_refused = False
        self.commits_unheard = False  # done, but the answer is lost
        self.seen_dead: set[str] = set()  # that the router has noticed
        self.gate = asyncio.Event()
        self.gate.set()

    async def acquire(self, request: AcquireRequest) -> Grant:
        self.requests.append(request)
        await self._pass()
        in_force = self.leases.get(request.session)
        if in_force is not None and request.after_epoch < in_force.epoch:
            raise StaleEpoch(f"It is at epoch {in_force.epoch}, not {request.after_epoch}.")
        lease = self._place(request)
        self.pending.pop(request.session, None)
        self.leases[request.session] = lease
        await self._pass()
        return self._grant(request.session, lease)

    async def prepare(self, request: AcquireRequest) -> Grant:
        self.requests.append(request)
        await self._pass()
        lease = self.leases.get(request.session)
        if lease is None or lease.owner != request.ingress or lease.epoch != request.after_epoch:
            raise StaleEpoch("Not yours to move.")
        pending = self._place(request, lease.replica)
        self.pending[request.session] = pending
        await self._pass()
        return self._grant(request.session, pending)

    async def commit(self, session: str, epoch: int) -> None:
        await self._pass()
        if self.away:
            raise ConnectionError("away")
        active, pending = self.leases.get(session), self.pending.get(session)
        if active is not None and active.epoch == epoch:
            return
        if pending is None or pending.epoch != epoch or self.commits_refused:
            raise StaleEpoch("It has run out.")
        self.leases[session] = self.pending.pop(session)
        if self.commits_unheard:
            raise ConnectionError("away")

    async def resume(self, request: ResumeRequest) -> Grant:
        await self._pass()
        lease = self.leases.get(request.session)
        if lease is None:
            raise UnknownSession("Gone.")
        if lease.serial != request.serial:
            raise StaleEpoch("Used.")
        self.pending.pop(request.session, None)
        self.leases[request.session] = Lease(
            self._next(request.session), lease.replica, request.ingress, lease.serial + 1
        )
        return self._grant(request.session, self.leases[request.session])

    async def unspend(self, session: str, epoch: int) -> None:
        lease = self.leases[session]
        assert (lease.epoch, lease.owner) == (epoch, self.ingress)
        self.unspent.append(session)
        self.leases[session] = Lease(lease.epoch, lease.replica, lease.owner, lease.serial - 1)

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        lease, pending = self.leases.get(session), self.pending.get(session)
        if lease is not None and (lease.epoch, lease.owner) == (epoch, self.ingress):
            del self.leases[session]
            self.pending.pop(session, None)
        elif pending is not None and pending.epoch == epoch:
            del self.pending[session]

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        for table in (self.pending, self.leases):
            lease = table.get(session)
            if lease is not None and lease.epoch > after_epoch and lease.owner == self.ingress:
                del table[session]

    async def locate(self, session: str) -> Grant | None:
        lease = self.leases.get(session)
        return None if lease is None else self._grant(session, lease)

    async def replicas(self) -> tuple[ReplicaView, ...]:
        self.looks += 1
        return tuple(
            ReplicaView(
                name, self.nodes.get(name, "node"), f"ws://{name}", r.slots, len(r.held), 0,
                r.slots - self._held(name), r.alive, False, 1.0, r.numerics,
            )
            for name, r in self.replicas_by_name.items()
        )  # fmt: skip

    def _held(self, name: str) -> int:
        return sum(lease.replica == name for table in (self.leases, self.pending) for lease in table.values())

    async def drain(self, replica: str) -> None:
        if replica not in self.replicas_by_name:
            raise UnknownReplica(f"There is no replica {replica}.")
        self.replicas_by_name[replica].ask_to_move()

    async def _pass(self) -> None:
        await asyncio.sleep(0)
        await self.gate.wait()

    def _place(self, request: AcquireRequest, *avoid: str) -> Lease:
        for name, replica in self.replicas_by_name.items():
            held = self._held(name)
            if request.apart and self.nodes.get(name) == request.ingress_node:
                continue
            if name not in (*request.avoid, *avoid) and name not in self.seen_dead and held < replica.slots:
                return Lease(self._next(request.session), name, request.ingress, request.serial)
        raise NoCapacity("All slots are taken.")

    def _next(self, session: str) -> int:
        epoch = self.highest[session] = self.highest.get(session, 0) + 1
        return epoch

    def _grant(self, session: str, lease: Lease) -> Grant:
        numerics = self.replicas_by_name[lease.replica].numerics
        node = self.nodes.get(lease.replica, "")
        return Grant(session, lease.epoch, lease.replica, f"ws://{lease.replica}", numerics, lease.serial, node)


class Trunks:
    """serving.relocation.TrunkSource."""

    def __init__(self, replicas: dict[str, FakeReplica]) -> None:
        self._replicas = replicas

    async def get(self, address: str) -> FakeReplica:
        await asyncio.sleep(0)
        replica = self._replicas[address.removeprefix("ws://")]
        if not replica.alive:
            raise ReplicaLost("cannot be reached")
        return replica


class World:
    """One ingress (or more: `ingress`), its replicas, and time."""

    def __init__(
        self, replicas: int = 3, slots: int = 4, clock: FakeClock | MonotonicClock | None = None, **settings: object
    ) -> None:
        self.clock = FakeClock()
        self._clock = clock or self.clock
        self.replicas = {f"r{i}": FakeReplica(f"r{i}", slots) for i in range(replicas)}
        self.settings = ServeSettings(**settings)  # type: ignore[arg-type] # any field of it
        self.router = CountingRouter(self.replicas, "i0")
        self.hub = self.ingress("i0")

    def ingress(self, name: str) -> ConversationHub:
        """Another ingress, over the same router's books."""
        router = CountingRouter(self.replicas, name)
        router.leases, router.pending, router.highest = self.router.leases, self.router.pending, self.router.highest
        router.gate = self.router.gate
        return ConversationHub(
            self.router if name == "i0" else router,
            Trunks(self.replicas),
            Place(name, "node-1"),
            self.settings,
            clock=self._clock,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Messages pass by themselves, as they come. For tests in real time."""

        async def go() -> None:
            while True:
                await self.run(1)
                await asyncio.sleep(0.001)

        task = asyncio.create_task(go())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(self, turns: int = 40) -> None:
        """Let all messages pass until nothing moves any more; time stands still."""
        for _ in range(turns):
            await settle(5)
            for replica in self.replicas.values():
                replica.work()
                replica.flush()

    async def pass_time(self, seconds: float, step_s: float = 0.1) -> None:
        for _ in range(round(seconds / step_s)):
            await self.clock.advance(step_s)
            await self.run(4)

    async def assert_nothing_is_left(self) -> None:
        """Every slot released or never granted, every sink detached, no replica holds anything."""
        await self.hub.close()
        await self.run()
        assert self.router.leases == {}
        assert self.router.pending == {}
        for replica in self.replicas.values():
            assert replica.sinks == {}, replica.name
            if replica.alive:
                assert replica.held == {}, replica.name
        assert self.hub.live == 0

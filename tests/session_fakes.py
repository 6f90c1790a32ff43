"""A router and a trunk that a test holds in its hands, around the real ConversationHub."""

from __future__ import annotations

import asyncio

import numpy as np

from actors.errors import NoCapacity, ReplicaLost, UnknownReplica, UnknownSession
from actors.messages import CloseRequest, Down, DownSink, Failed, FrameIn, FrameOut, OpenRequest, Ready, Up
from graphs.stages import FrameKey, SessionSpec
from serving.routing import AcquireRequest, Grant, ReplicaView, ResumeRequest
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.tenants import Tenant
from tests.fake_clock import FakeClock

SPEC = SessionSpec("voice", "role", 7)
TENANT = Tenant("acme", 3)
PCM = np.arange(1920, dtype=np.int16)


class Gate:
    """Where a fake stands still while a test cancels its caller; open unless a test shuts it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.passing = 0

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def passed(self) -> None:
        self.passing += 1
        await self._open.wait()


class FakeRouter:
    """Counts slots the way the real one does: a grant holds one until it is released or abandoned."""

    def __init__(self, slots: int = 2) -> None:
        self.free = slots
        self.replicas = ["r1"]
        self.held: dict[str, int] = {}
        self.requests: list[AcquireRequest] = []
        self.released: list[tuple[str, int, bool]] = []
        self.before = Gate()  # the request is on its way
        self.after = Gate()  # the grant is on its way back

    async def acquire(self, request: AcquireRequest) -> Grant:
        self.requests.append(request)
        await self.before.passed()
        if not self.free or set(self.replicas) <= set(request.avoid):
            raise NoCapacity("All slots are taken.")
        self.free -= 1
        epoch = self.held[request.session] = request.after_epoch + 1
        await self.after.passed()
        replica = next(replica for replica in self.replicas if replica not in request.avoid)
        return Grant(request.session, epoch, replica, f"ws://{replica}", "numerics")

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        self.released.append((session, epoch, opened))
        self._free(session)

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        self._free(session)

    async def prepare(self, request: AcquireRequest) -> Grant:
        raise NoCapacity("Nowhere to move to.")

    async def commit(self, session: str, epoch: int) -> None:
        raise AssertionError("nothing was prepared")

    async def resume(self, request: ResumeRequest) -> Grant:
        raise UnknownSession("Not here.")

    async def locate(self, session: str) -> Grant | None:
        return None

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return ()

    async def drain(self, replica: str) -> None:
        raise UnknownReplica("There is none.")

    def _free(self, session: str) -> None:
        if self.held.pop(session, None):
            self.free += 1


class FakeTrunk:
    """One replica's trunk: records what goes up; `down` delivers."""

    def __init__(self) -> None:
        self.version = 2
        self.sent: list[Up] = []
        self.sinks: dict[tuple[str, int], DownSink] = {}
        self.gate = Gate()
        self.lost = False

    def attach(self, session: str, epoch: int, sink: DownSink) -> None:
        self.sinks[session, epoch] = sink

    def detach(self, session: str, epoch: int) -> None:
        self.sinks.pop((session, epoch), None)

    async def send(self, message: Up) -> None:
        await self.gate.passed()
        self.send_nowait(message)

    def send_nowait(self, message: Up) -> None:
        if self.lost:
            raise ReplicaLost("gone")
        self.sent.append(message)

    def down(self, message: Down) -> None:
        for sink in list(self.sinks.values()):
            sink(message)

    @property
    def opened(self) -> OpenRequest:
        return next(message for message in self.sent if isinstance(message, OpenRequest))

    @property
    def frames(self) -> list[int]:
        return [message.key.frame for message in self.sent if isinstance(message, FrameIn)]

    @property
    def closes(self) -> list[CloseRequest]:
        return [message for message in self.sent if isinstance(message, CloseRequest)]


class Trunks:
    def __init__(self, trunk: FakeTrunk) -> None:
        self.trunk = trunk
        self.gate = Gate()
        self.dead: set[str] = set()

    async def get(self, address: str) -> FakeTrunk:
        await self.gate.passed()
        if self.trunk.lost or address in self.dead:
            raise ReplicaLost("cannot be reached")
        return self.trunk


class Stage:
    """Hub, router, trunk and clock, and the replica's lines for a test to speak."""

    def __init__(self, slots: int = 2, **settings: object) -> None:
        self.clock = FakeClock()
        self.router = FakeRouter(slots)
        self.trunk = FakeTrunk()
        self.trunks = Trunks(self.trunk)
        self.settings = ServeSettings(**settings)  # type: ignore[arg-type] # any field of it
        self.hub = ConversationHub(
            self.router,
            self.trunks,
            Place("ingress-1", "node-1"),
            self.settings,
            has_voice=lambda name: name == "voice",
            clock=self.clock,
        )

    def ready(self) -> None:
        request = self.trunk.opened
        self.trunk.down(Ready(request.session, request.epoch, 0, 30, "hash", 12.0))

    def answer(self, frame: int, text: str = "") -> None:
        request = self.trunk.opened
        zeros = np.zeros(8, dtype=np.int16)
        pcm = np.full(1920, frame, dtype=np.int16)
        row = np.zeros(17, dtype=np.int16)
        key = FrameKey(request.session, request.epoch, frame)
        self.trunk.down(FrameOut(key, pcm, 3, text, zeros, zeros, row, 20.0))

    def fail(self, code: str) -> None:
        request = self.trunk.opened
        self.trunk.down(Failed(request.session, request.epoch, code, "It failed."))

    async def assert_nothing_is_left(self, slots: int = 2) -> None:
        await self.hub.close()
        assert self.router.free == slots
        assert self.router.held == {}
        assert self.trunk.sinks == {}
        assert self.hub.live == 0
        assert len(self.trunk.closes) == sum(isinstance(message, OpenRequest) for message in self.trunk.sent)

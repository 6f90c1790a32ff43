"""Replicas that die, a router that counts, and a clock that a test moves, around the real ConversationHub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from actors.errors import NoCapacity, ReplicaLost, StaleEpoch, UnknownReplica, UnknownSession
from actors.interfaces import MonotonicClock
from serving.routing import AcquireRequest, Grant, ReplicaView, ResumeRequest
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.tenants import Tenant
from tests.fake_clock import FakeClock, settle
from tests.fake_replica import FakeReplica

TENANT = Tenant("acme", 3)


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
        if lease is None or lease.owner != request.ingress or request.after_epoch < lease.epoch:
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

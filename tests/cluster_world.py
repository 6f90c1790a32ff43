"""A cluster without processes: the real router, real replicas with stages of arithmetic, and ingresses in miniature.

Everything that can go wrong is a method; time is a clock that stands still until it is moved. What a client hears is
compared, frame by frame, with an undisturbed run of its conversation.
"""

from __future__ import annotations

from serving.router import SessionRouter
from serving.routing import RouterConfig
from tests.cluster_ingresses import Ingresses
from tests.cluster_node import TURNS, Node
from tests.fake_clock import FakeClock, settle

LEASE_S = 3.0
BEAT_S = 0.5


class World:
    """The machines: replicas, a router's lives; and the ingresses that make use of them."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.clock = FakeClock()
        self.lives = 1  # of routers
        self.router = self._new_router()
        self.nodes: dict[str, Node] = {}
        self.ingresses = Ingresses(self.nodes, lambda: self.router, self.clock)
        self.count = 0

    def _new_router(self) -> SessionRouter:
        return SessionRouter(self.config, self.clock.now, epochs_before=self.lives * 1_000_000)

    # ---- what happens to machines -----------------------------------------------------------------------------

    async def start(self, slots: int) -> None:
        self.count += 1
        node = Node(f"r{self.count}", slots, self.clock)
        self.nodes[node.name] = node
        await settle(5)
        node.beat(self.router)

    async def kill(self, node: Node) -> None:
        await node.die()
        del self.nodes[node.name]
        self.ingresses.notice()

    async def cut_off(self, node: Node, *, deaf: bool, far: bool) -> None:
        """From the router, from the ingresses, from both; or back. A trunk that is lost is lost for both ends."""
        if far and not node.far:
            for call in list(node.replica._calls):
                node.replica.leave(call.session, call.epoch, call.sink)
        node.deaf, node.far = deaf, far
        self.ingresses.notice()
        await settle(TURNS)

    async def restart_router(self) -> None:
        self.lives += 1
        self.router = self._new_router()

    async def beat(self) -> None:
        """All replicas report."""
        for node in list(self.nodes.values()):
            node.beat(self.router)
        await settle(TURNS)

    async def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT_S)):
            await self.clock.advance(BEAT_S)
            await self.beat()
            self.router.tick()
        await self.beat()
        self.check_owners()

    # ---- what must always hold --------------------------------------------------------------------------------

    def check(self) -> None:
        for node in self.nodes.values():
            held = [slot.session for slot in node.replica.report()]
            assert len(held) == len(set(held)) <= node.replica.slots
        for view in self.router.replicas():
            assert view.free <= view.slots - view.busy - view.arriving

    def check_owners(self) -> None:
        """When all reports are in, every conversation that a replica holds has a lease there, and every lease one."""
        leases = self.router._leases
        for node in self.nodes.values():
            if node.deaf:
                continue
            held = {(slot.session, slot.epoch) for slot in node.replica.report()}
            owned = leases.on(node.name)
            assert held == {key for key in held if any(key in [(x.session, e) for e in x.epochs] for x in owned)}
            assert all(lease.is_in(dict(held)) for lease in owned if lease.confirmed)
            assert len({lease.session for lease in owned}) == len(owned)

"""Random lives of a whole cluster: joins, leaves, deaths, partitions, drains, moves, resumes, router restarts.

Whatever happens, in any order: what a client hears is an undisturbed run of its conversation, no frame lost or doubled;
no slot is owned twice; nobody speaks under an old epoch; and when all have hung up, nothing is left anywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.routing import RouterConfig
from tests.cluster_node import GRACE_S, Node
from tests.cluster_talk import Talk
from tests.cluster_world import LEASE_S, World

INGRESSES = ("i1", "i2")
PICK = st.integers(0, 1000)


class ClusterMachine(RuleBasedStateMachine):
    """Picks by number, so that every step means something in every state."""

    @initialize(sizes=st.lists(st.integers(2, 4), min_size=2, max_size=4), reserve=st.sampled_from([0, None]))
    def begin(self, sizes: list[int], reserve: int | None) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._begin(sizes, reserve))

    async def _begin(self, sizes: list[int], reserve: int | None) -> None:
        self.world = World(RouterConfig(lease_s=LEASE_S, reserve_slots=reserve, settle_s=1.0, rebuilds_at_once=2))
        self.ingresses = self.world.ingresses
        await self.world.pass_s(1.0)
        for slots in sizes:
            await self.world.start(slots)

    def run(self, what: Awaitable[object]) -> object:
        return self.loop.run_until_complete(what)

    def node(self, pick: int) -> Node:
        nodes = list(self.world.nodes.values())
        return nodes[pick % len(nodes)]

    def talk(self, pick: int) -> Talk:
        talks = list(self.ingresses.talks.values())
        return talks[pick % len(talks)]

    # ---- callers and what their ingresses do for them. Each rule is as likely as any other, so disasters share one.

    @rule(ingresses=st.lists(st.sampled_from(INGRESSES), min_size=1, max_size=3))
    def callers_come(self, ingresses: list[str]) -> None:
        for ingress in ingresses:
            self.run(self.ingresses.join(ingress))

    @precondition(lambda self: self.ingresses.talks)
    @rule(frames=st.integers(1, 3))
    def all_speak(self, frames: int) -> None:
        for talk in list(self.ingresses.talks.values()):
            self.run(self.ingresses.speak(talk, frames))

    @precondition(lambda self: self.ingresses.talks)
    @rule(pick=PICK, what=st.sampled_from(["hangs up", "loses its socket", "loses its socket"]))
    def client(self, pick: int, what: str) -> None:
        talk = self.talk(pick)
        self.run(self.ingresses.leave(talk) if what == "hangs up" else self.ingresses.park(talk))

    @precondition(lambda self: any(talk.parked for talk in self.ingresses.talks.values()))
    @rule(ingress=st.sampled_from(INGRESSES))
    def clients_come_back(self, ingress: str) -> None:
        for talk in [talk for talk in self.ingresses.talks.values() if talk.parked]:
            self.run(self.ingresses.resume(talk, ingress))

    @precondition(lambda self: any(talk.lost for talk in self.ingresses.talks.values()))
    @rule()
    def the_lost_are_recovered(self) -> None:
        for talk in [talk for talk in self.ingresses.talks.values() if talk.lost]:
            self.run(self.ingresses.recover(talk))

    @precondition(lambda self: any(not talk.lost for talk in self.ingresses.talks.values()))
    @rule(pick=PICK)
    def begins_to_move(self, pick: int) -> None:
        well = [talk for talk in self.ingresses.talks.values() if not talk.lost]
        self.run(self.ingresses.begin_move(well[pick % len(well)]))

    @precondition(lambda self: any(talk.next for talk in self.ingresses.talks.values()))
    @rule(pick=PICK, gives_up=st.sampled_from([False, False, True]))
    def ends_its_move(self, pick: int, gives_up: bool) -> None:
        moving = [talk for talk in self.ingresses.talks.values() if talk.next]
        talk = moving[pick % len(moving)]
        self.run(self.ingresses.abort_move(talk) if gives_up else self.ingresses.end_move(talk))

    @rule(seconds=st.sampled_from([0.5, 0.5, 1.0, LEASE_S, 2 * LEASE_S + 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.run(self.world.pass_s(seconds))

    # ---- machines

    @precondition(lambda self: len(self.world.nodes) < 5)
    @rule(slots=st.integers(2, 4))
    def replica_starts(self, slots: int) -> None:
        self.run(self.world.start(slots))

    @rule(pick=PICK, what=st.sampled_from(["replica", "engine", "router", "ingress", "drain", "deaf", "far", "both"]))
    def something_breaks(self, pick: int, what: str) -> None:
        world, node = self.world, self.node(pick)
        if what == "replica" and len(world.nodes) > 1:
            self.run(world.kill(node))
        elif what == "engine" and node.replica.healthy:
            self.run(node.lose_engine())
        elif what == "router":
            self.run(world.restart_router())
        elif what == "ingress":
            self.run(world.ingresses.lose(INGRESSES[pick % 2]))
        elif what == "drain" and any(view.replica == node.name for view in world.router.replicas()):
            world.router.drain(node.name)
        elif what in ("deaf", "far", "both"):
            self.run(world.cut_off(node, deaf=what != "far", far=what != "deaf"))

    @precondition(lambda self: any(n.deaf or n.far or not n.replica.healthy for n in self.world.nodes.values()))
    @rule()
    def what_broke_is_mended(self) -> None:
        for node in self.world.nodes.values():
            if not node.replica.healthy:
                self.run(node.revive())
            if node.deaf or node.far:
                self.run(self.world.cut_off(node, deaf=False, far=False))

    # ---- what must hold

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            self.ingresses.check()
            self.ingresses.say_as_zombies()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                self.run(self._all_are_kept_and_nothing_is_left())
            finally:
                left = asyncio.all_tasks(self.loop)  # after a failure alone
                for task in left:
                    task.cancel()
                self.run(self._gone(left))
                self.loop.close()

    async def _gone(self, tasks: Iterable[asyncio.Task[object]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _all_are_kept_and_nothing_is_left(self) -> None:
        world, ingresses = self.world, self.ingresses
        # Peace: everybody is within reach, there is room, and ingresses do what they do.
        for node in list(world.nodes.values()):
            if not node.replica.healthy:
                await node.revive()
            await world.cut_off(node, deaf=False, far=False)
        for _ in range(2):
            await world.start(20)
        await world.pass_s(2 * LEASE_S)
        for talk in list(ingresses.talks.values()):
            if talk.parked:
                if not await ingresses.resume(talk, "i1"):
                    ingresses.forget(talk)  # it came too late, or both ends were lost at once: the one double fault
                continue
            for _ in range(10):
                if not talk.lost:
                    break
                await ingresses.recover(talk)
                await world.pass_s(0.5)
            assert not talk.lost, f"{talk.session} was not taken in again"
            before = talk.heard
            await ingresses.end_move(talk)
            await ingresses.speak(talk, 2)
            await ingresses.feed(talk)
            await world.pass_s(0.5)
            assert talk.heard == talk.journal.heard_frames > before, "it does not speak again"
        emptied = [node for node in world.nodes.values() if node.told_to_drain]
        for _ in range(10):  # a replica asks again and again: a next home reads some journals at a time
            for talk in list(ingresses.talks.values()):
                if talk.home is not None and talk.home.node in emptied:
                    await ingresses.begin_move(talk)
                    await ingresses.end_move(talk)
            await world.pass_s(0.5)
            if all(node.replica.drained for node in emptied):
                break
        assert all(node.replica.drained for node in emptied), "a replica that was to be emptied is not"
        for talk in list(ingresses.talks.values()):
            await ingresses.leave(talk)
        await world.pass_s(GRACE_S + 2 * LEASE_S)
        router = world.router
        assert router.status().busy == router.status().waiting == 0
        for node in world.nodes.values():
            assert node.replica.busy == 0, f"{node.name} holds {node.replica.report()}"
            assert router._leases.occupied(node.name) == 0
        for node in list(world.nodes.values()):
            await node.stop()


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.full
@pytest.mark.timeout(1800)
class TestClusterMachineForLong(ClusterMachine.TestCase):  # type: ignore[misc, valid-type] # hypothesis makes it
    settings = settings(
        max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )

"""A slot on its ingress's own node is left for another node's, one conversation at a time, if that one keeps up."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from serving.routing import AcquireRequest, Grant
from tests.failover_callers import calling
from tests.failover_fakes import TENANT, World
from tests.fake_replica import SPEC


async def test_a_slot_on_the_ingress_own_node_is_left_soon_after_another_node_has_room() -> None:
    """Or one machine's death would take the slot and the journal: the one double fault."""
    world = World(replicas=2)
    world.router.nodes = {"r0": "node-1", "r1": "node-2"}  # r0 is where the ingress is
    world.replicas["r1"].slots = 0
    async with calling(world) as caller:
        residence = caller.conversation.residence
        await caller.say(400)  # 32 s
        assert residence.home is not None
        assert residence.home.replica == "r0"
        world.replicas["r1"].slots = 4
        await caller.say(20)  # 1.6 s
        assert residence.home.replica == "r1"
        assert residence.moves == 1
        caller.assert_undisturbed()
        assert len(caller.heard) == 420
        asked = len(world.router.requests)
        await caller.say(100)
        assert len(world.router.requests) == asked  # it stays


async def test_where_there_is_no_other_node_the_question_is_rare() -> None:
    world = World(replicas=2)
    world.router.nodes = {"r0": "node-1", "r1": "node-1"}
    async with calling(world) as caller, world.hub.open(SPEC, TENANT, "test"):
        await caller.say(600)  # 48 s
        assert caller.conversation.residence.moves == 0  # nowhere to go, and that is no reason to go to r1
        assert world.router.looks == 2  # for both together
        world.router.nodes["r1"] = "node-2"
        await caller.say(400)
        assert caller.conversation.residence.moves == 1
        caller.assert_undisturbed()


async def test_those_who_leave_the_ingress_own_node_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that three of them would hold twice are those that a replica's death needs."""
    world = World(replicas=2)
    world.router.nodes = {"r0": "node-1", "r1": "node-2"}
    at_once: list[int] = []
    prepare = world.router.prepare

    async def counting(request: AcquireRequest) -> Grant:
        grant = await prepare(request)
        at_once.append(len(world.router.pending))
        return grant

    monkeypatch.setattr(world.router, "prepare", counting)
    async with calling(world) as caller, AsyncExitStack() as others:
        silent = [await others.enter_async_context(world.hub.open(SPEC, TENANT, "test")) for _ in range(2)]
        await caller.say(80)
        assert [each.residence.moves for each in (caller.conversation, *silent)] == [1, 1, 1]
        caller.assert_undisturbed()
    assert at_once == [1, 1, 1]


async def test_nobody_leaves_the_ingress_own_node_for_a_replica_that_cannot_keep_up() -> None:
    """It would be heard as a gap, and the home it has is a good one. Each try costs that replica a rebuild."""
    world = World(replicas=2)
    world.router.nodes = {"r0": "node-1", "r1": "node-2"}
    world.replicas["r1"].stuck = True
    async with calling(world) as caller:
        residence = caller.conversation.residence
        for frame in range(400):  # 32 s
            await caller.say(1)
            assert len(caller.heard) == frame + 1  # not one is late
        assert residence.home is not None
        assert residence.home.replica == "r0"
        assert residence.moves == 0
        # After 3 s; then each try takes 5 s, and the next one comes 1, 2, 4 s after it.
        assert len(world.replicas["r1"].opened) == 4
        world.replicas["r1"].stuck = False
        await caller.say(150)
        assert residence.home.replica == "r1"
        assert residence.moves == 1
        caller.assert_undisturbed()

"""Moves as a client sees them: none is noticed, and one that comes to nothing costs nothing."""

from __future__ import annotations

import asyncio

import pytest

from tests.failover_callers import calling
from tests.failover_fakes import World


async def test_a_move_is_not_noticed() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        for _ in range(12):
            before = len(caller.heard)
            await caller.say(1)
            assert len(caller.heard) > before  # not one frame is late
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r1"
        assert caller.conversation.residence.moves == 1
        assert not world.replicas["r0"].held
        caller.assert_undisturbed()
        assert all(len(frame.pcm) for frame in caller.heard)


async def test_a_death_soon_after_a_move_is_not_the_conversations_doing() -> None:
    """Suspects are rebuilt one at a time: four that had just moved waited for one another for ten seconds."""
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        await caller.say(12)
        home = caller.conversation.residence.home
        assert home is not None
        assert home.frames < 25
        world.replicas[home.replica].die()
        await caller.say(10)
        assert [request.deaths for request in world.router.requests if request.recovery] == [0]
        home = caller.conversation.residence.home
        assert home is not None
        world.replicas[home.replica].die()  # but who was rebuilt, and the replica is dead again, may be
        await caller.say(10)
        # Asked twice: the replica that died first is offered once more.
        assert [request.deaths for request in world.router.requests if request.recovery] == [0, 1, 1]
        caller.assert_undisturbed()


async def test_who_says_nothing_is_moved_too() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(3)
        world.replicas["r0"].ask_to_move()
        await world.run()
        assert caller.conversation.residence.moves == 1
        await caller.say(3)
        caller.assert_undisturbed()


async def test_who_was_asked_to_move_goes_over_to_a_replica_that_hardly_keeps_up() -> None:
    """Its home is to be emptied; what it loses is time, no frame."""
    world = World(replicas=2)
    world.replicas["r1"].stuck = True
    async with calling(world) as caller:
        residence = caller.conversation.residence
        await caller.say(10)
        world.replicas["r0"].ask_to_move()
        await caller.say(60)  # 4.8 s
        assert residence.moves == 0
        await caller.say(5)
        assert residence.moves == 1
        world.replicas["r1"].stuck = False
        await caller.say(5)
        assert len(caller.heard) == 80
        caller.assert_undisturbed()


async def test_a_home_that_dies_during_a_move_hands_over_to_the_next() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        world.replicas["r0"].flush()
        for _ in range(40):
            await asyncio.sleep(0)
        assert world.replicas["r1"].inbox
        world.replicas["r0"].die()
        await caller.say(20)
        assert len(world.replicas["r1"].opened) == 1
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r1"
        caller.assert_undisturbed()
        assert len(caller.heard) == 50


async def test_a_next_home_that_dies_costs_nothing() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        world.replicas["r0"].flush()
        for _ in range(40):
            await asyncio.sleep(0)
        world.replicas["r1"].die()
        await caller.say(10)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r0"
        assert world.router.pending == {}
        world.router.seen_dead.add("r1")
        world.replicas["r0"].ask_to_move()  # as it does every second
        await caller.say(10)
        assert caller.conversation.residence.home.replica == "r2"
        caller.assert_undisturbed()


async def test_a_next_home_that_says_something_else_is_not_believed() -> None:
    world = World(replicas=2)
    world.replicas["r1"].deceives = True
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        await caller.say(10)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r0"
        assert caller.conversation.residence.differs
        caller.assert_undisturbed()


async def test_a_move_to_other_numerics_has_one_voice_at_a_time() -> None:
    world = World(replicas=2)
    world.replicas["r1"].numerics = "other"
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].ask_to_move()
        await caller.say(10)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r1"
        assert not caller.conversation.residence.exact
        assert [frame.key.frame for frame in caller.heard] == list(range(40))


async def test_without_room_elsewhere_it_stays() -> None:
    world = World(replicas=1)
    async with calling(world) as caller:
        await caller.say(10)
        for _ in range(3):
            world.replicas["r0"].ask_to_move()
            await caller.say(3)
        caller.assert_undisturbed()
        assert len(caller.heard) == 19


async def test_a_commit_is_repeated_while_the_router_is_away() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        world.router.away = True
        world.replicas["r0"].ask_to_move()
        await caller.say(20)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r0"
        world.router.away = False
        await caller.say(5)
        assert caller.conversation.residence.home.replica == "r1"
        caller.assert_undisturbed()


async def test_a_home_that_dies_while_the_router_is_away_is_replaced_by_the_next() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        world.router.away = True
        world.replicas["r0"].ask_to_move()
        await caller.say(10)
        world.replicas["r0"].die()
        await caller.say(10)
        assert len(caller.heard) == 30
        world.router.away = False
        await caller.say(10)
        assert world.router.leases[caller.conversation.session].replica == "r1"
        caller.assert_undisturbed()


@pytest.mark.parametrize("code", ["stale_epoch", "engine_lost"])
async def test_a_home_that_ends_before_the_commit_is_answered_is_left_without_a_pause(code: str) -> None:
    """The router tells the old home with its next report, which may be before its answer is here."""
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        residence = caller.conversation.residence
        world.router.commits_unheard = True
        world.replicas["r0"].ask_to_move()
        while world.router.leases[caller.conversation.session].replica == "r0":
            await caller.say(1)
        assert world.router.pending == {}
        assert residence.home is not None
        assert residence.home.replica == "r0"
        world.replicas["r0"].lose_engine(code)
        world.replicas["r0"].flush()
        assert residence.home.replica == "r1"
        assert (residence.recoveries, residence.moves, residence.deaths) == (0, 1, 0)
        await caller.say(10)
        world.router.commits_unheard = False
        await caller.say(10)
        caller.assert_undisturbed()
        assert len(caller.heard) == caller.said
        assert all(len(frame.pcm) for frame in caller.heard), "nothing is heard of it"
        assert residence.settled


async def test_a_next_home_that_dies_right_after_it_took_over_is_replaced() -> None:
    """Both end before the router's answer is here."""
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        residence = caller.conversation.residence
        world.router.commits_unheard = True
        world.replicas["r0"].ask_to_move()
        while world.router.leases[caller.conversation.session].replica == "r0":
            await caller.say(1)
        for name in ("r0", "r1"):
            world.replicas[name].lose_engine()
            world.replicas[name].flush()
        assert residence.home is None
        await caller.say(10)
        world.router.commits_unheard = False
        await caller.say(20)
        caller.assert_undisturbed()
        assert len(caller.heard) == caller.said
        assert (residence.recoveries, residence.moves) == (1, 1)
        assert residence.settled


async def test_a_move_that_has_run_out_is_given_up() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        world.router.commits_refused = True
        world.replicas["r0"].ask_to_move()
        await caller.say(10)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r0"
        assert not world.replicas["r1"].held
        caller.assert_undisturbed()

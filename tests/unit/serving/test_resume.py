"""Coming back after a lost socket: at any ingress, once per token, with what was missed or without it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors.errors import Draining, ReplicaLost, StaleEpoch
from actors.messages import FrameOut
from serving.resume import Missed, NothingToResume, Ticket
from serving.session import ConversationHub
from tests.failover_callers import run, talk
from tests.failover_fakes import TENANT, World
from tests.fake_replica import SPEC, undisturbed


async def lost_client(world: World, hub: ConversationHub, frames: int) -> tuple[Ticket, list[FrameOut]]:
    """A conversation whose client is lost after so many frames."""
    async with hub.open(SPEC, TENANT, "test", resumable=True) as conversation:
        await run(world, conversation.ready())
        heard = await talk(world, conversation, frames)
        conversation.park()
    return Ticket(conversation.session, conversation.holding.serial), heard


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_who_comes_back_goes_on_where_it_was(elsewhere: bool) -> None:
    world = World()
    ticket, heard = await lost_client(world, world.hub, 40)
    await world.pass_time(20.0)
    hub = world.ingress("i1") if elsewhere else world.hub
    resuming = hub.resume(ticket, TENANT, "test", Missed())
    conversation = await run(world, resuming.__aenter__())
    assert conversation.session == ticket.session
    assert conversation.spec == SPEC
    assert conversation.first_frame == 40
    heard += await talk(world, conversation, 10)
    assert [frame.key.frame for frame in heard] == list(range(50))
    assert [frame.text_token for frame in heard] == undisturbed(50)
    assert len(world.replicas["r0"].opened) == 1, "the same slot"
    await resuming.__aexit__(None, None, None)
    await hub.close()
    await world.assert_nothing_is_left()


async def test_it_is_recovered_after_a_resumption_as_before() -> None:
    world = World()
    ticket, heard = await lost_client(world, world.hub, 40)
    hub = world.ingress("i1")
    resuming = hub.resume(ticket, TENANT, "test", Missed())
    conversation = await run(world, resuming.__aenter__())
    heard += await talk(world, conversation, 10)
    world.replicas["r0"].die()
    heard += await talk(world, conversation, 10)
    assert [frame.text_token for frame in heard] == undisturbed(60)
    assert conversation.residence.recoveries == 1
    await resuming.__aexit__(None, None, None)
    await hub.close()
    await world.assert_nothing_is_left()


async def test_a_replica_that_dies_meanwhile_costs_nothing() -> None:
    world = World()
    ticket, heard = await lost_client(world, world.hub, 40)
    world.replicas["r0"].die()
    await world.pass_time(2.0)
    assert world.replicas["r1"].held
    resuming = world.hub.resume(ticket, TENANT, "test", Missed())
    conversation = await run(world, resuming.__aenter__())
    heard += await talk(world, conversation, 10)
    assert [frame.text_token for frame in heard] == undisturbed(50)
    await resuming.__aexit__(None, None, None)
    await world.assert_nothing_is_left()


@pytest.mark.parametrize("replay", [False, True])
async def test_what_was_missed_is_heard_or_skipped(replay: bool) -> None:
    world = World()
    ticket, heard = await lost_client(world, world.hub, 40)
    resuming = world.hub.resume(ticket, TENANT, "test", Missed(have=33, replay=replay))
    conversation = await run(world, resuming.__aenter__())
    assert conversation.first_frame == 33
    again = await talk(world, conversation, 5)
    assert [frame.key.frame for frame in again] == list(range(33, 45))
    assert [frame.text_token for frame in again] == undisturbed(45)[33:]  # text in any case
    assert [len(frame.pcm) > 0 for frame in again] == [replay] * 7 + [True] * 5
    assert np.array_equal(heard[-1].pcm, again[6].pcm) is replay
    await resuming.__aexit__(None, None, None)
    await world.assert_nothing_is_left()


async def test_what_lies_too_far_back_is_missed_for_good() -> None:
    world = World()
    ticket, _ = await lost_client(world, world.hub, 40)
    resuming = world.hub.resume(ticket, TENANT, "test", Missed(have=3, replay=True))
    conversation = await run(world, resuming.__aenter__())
    assert conversation.first_frame == 16
    again = await talk(world, conversation, 1)
    assert [frame.key.frame for frame in again] == list(range(16, 41))
    await resuming.__aexit__(None, None, None)
    await world.assert_nothing_is_left()


async def test_a_client_whose_loss_nobody_has_noticed_is_let_in_and_its_old_socket_ends() -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test", resumable=True) as former:
        await run(world, former.ready())
        await talk(world, former, 5)
        watching = asyncio.create_task(former.watch())
        hub = world.ingress("i1")
        resuming = hub.resume(Ticket(former.session, 0), TENANT, "test", Missed())
        conversation = await run(world, resuming.__aenter__())
        await world.run()
        with pytest.raises(StaleEpoch):
            await watching
        await talk(world, conversation, 5)
    await world.run()
    await talk(world, conversation, 5)  # its end was not ours
    await resuming.__aexit__(None, None, None)
    await hub.close()
    await world.assert_nothing_is_left()


async def test_a_token_is_good_for_one_use() -> None:
    world = World()
    ticket, _ = await lost_client(world, world.hub, 5)
    resuming = world.hub.resume(ticket, TENANT, "test", Missed())
    conversation = await run(world, resuming.__aenter__())
    assert conversation.holding.serial == 1
    with pytest.raises(NothingToResume):
        await run(world, world.hub.resume(ticket, TENANT, "test", Missed()).__aenter__())
    await talk(world, conversation, 3)  # it did no harm
    await resuming.__aexit__(None, None, None)
    await world.assert_nothing_is_left()


async def test_who_comes_too_late() -> None:
    world = World(resume_grace_s=30.0)
    ticket, _ = await lost_client(world, world.hub, 5)
    await world.pass_time(29.0)
    assert world.hub.live == 1
    await world.pass_time(2.0)
    assert world.hub.live == 0
    with pytest.raises(NothingToResume):
        await run(world, world.hub.resume(ticket, TENANT, "test", Missed()).__aenter__())
    await world.assert_nothing_is_left()


async def test_an_ingress_that_leaves_lets_the_slots_of_lost_clients_wait() -> None:
    world = World()
    ticket, _ = await lost_client(world, world.hub, 5)
    await world.hub.close()
    assert world.hub.live == 0
    assert world.replicas["r0"].held
    assert world.router.leases
    hub = world.ingress("i1")
    resuming = hub.resume(ticket, TENANT, "test", Missed())
    await talk(world, await run(world, resuming.__aenter__()), 5)
    await resuming.__aexit__(None, None, None)
    await hub.close()
    await world.assert_nothing_is_left()


async def test_a_system_that_stops_waits_for_nobody() -> None:
    world = World()
    await lost_client(world, world.hub, 5)
    entered = world.hub.open(SPEC, TENANT, "test", resumable=True)
    conversation = await entered.__aenter__()
    await run(world, conversation.ready())
    leaving = asyncio.create_task(world.hub.hang_up("The server is stopping."))
    with pytest.raises(Draining):
        await conversation.watch()
    conversation.park()  # as for any client whose socket goes
    await entered.__aexit__(None, None, None)
    await leaving
    await world.assert_nothing_is_left()


@pytest.mark.parametrize("turns", range(0, 40, 2))
async def test_a_client_that_is_lost_again_while_it_comes_back(turns: int) -> None:
    world = World()
    ticket, _ = await lost_client(world, world.hub, 5)
    task = asyncio.create_task(world.hub.resume(ticket, TENANT, "test", Missed()).__aenter__())
    for turn in range(turns):
        await asyncio.sleep(0)
        if turn % 4 == 3:
            world.replicas["r0"].work(1)
            world.replicas["r0"].flush(1)
    if task.done():
        return  # that was time enough to come back
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.pass_time(31.0)
    for session in list(world.router.leases):  # a lease whose slot nobody reports runs out
        if not any(session in replica.held for replica in world.replicas.values()):
            del world.router.leases[session]
    await world.assert_nothing_is_left()


async def test_a_replica_that_is_gone_as_well() -> None:
    world = World()
    ticket, _ = await lost_client(world, world.hub, 5)
    await world.hub.close()  # the ingress
    world.replicas["r0"].die()
    hub = world.ingress("i1")
    with pytest.raises(ReplicaLost):
        await run(world, hub.resume(ticket, TENANT, "test", Missed()).__aenter__())
    world.router.leases.clear()  # it runs out
    await hub.close()
    await world.assert_nothing_is_left()

"""Coming back after a lost socket: at any ingress, once per token, with what was missed or without it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import Draining, ReplicaLost, StaleEpoch, UnknownSession
from actors.messages import FrameOut
from serving.conversation import Conversation
from serving.resume import Missed, NothingToResume, Replay, Ticket, Tickets
from serving.session import ConversationHub
from serving.tenants import Tenant, Tenants
from tests.chat_world import ChatWorld
from tests.failover_fakes import SPEC, TENANT, World, spoken, undisturbed

OTHER = Tenant("other")


async def run(world: World, work: Any) -> Any:
    """The result of something that waits for the world."""
    task = asyncio.ensure_future(work)
    for _ in range(20):
        await world.run(4)
        if task.done():
            break
    return await task


async def talk(world: World, conversation: Conversation, frames: int) -> list[FrameOut]:
    """Say the next frames, hear what comes."""
    for _ in range(frames):
        await conversation.send(spoken(conversation.frames_sent))
        await world.clock.advance(0.08)
        await world.run(4)
    return hear(conversation)


def hear(conversation: Conversation) -> list[FrameOut]:
    frames = []
    while (frame := conversation._queue.take()) is not None:
        frames.append(frame)
    return frames


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


# Tokens


def test_a_token_says_what_it_was_issued_for() -> None:
    tickets = Tickets("secret")
    token = tickets.issue("abc", 3, TENANT)
    assert tickets.read(token, TENANT) == Ticket("abc", 3)
    for wrong in (
        token[:-1],
        token + "A",
        token.replace("abc", "abd"),
        token.replace(".3.", ".4."),
        "a.b.c",
        "..",
        ".1.é",
    ):
        with pytest.raises(NothingToResume):
            tickets.read(wrong, TENANT)
    with pytest.raises(NothingToResume):
        tickets.read(token, OTHER)
    with pytest.raises(NothingToResume):
        Tickets("another secret").read(token, TENANT)


def test_the_error_is_one_of_the_tree() -> None:
    assert issubclass(NothingToResume, UnknownSession)


def frame(number: int) -> FrameOut:
    from graphs.stages import FrameKey
    from tests.failover_fakes import Model

    return Model(SPEC).step(FrameKey("s", 1, number), spoken(number))


def test_new_frames_wait_for_missed_ones_but_not_for_ever() -> None:
    replay = Replay(5, 8)
    assert list(replay.take(frame(8))) == []
    assert [each.key.frame for number in (5, 6, 7) for each in replay.take(frame(number))] == [5, 6, 7, 8]
    replay = Replay(5, 8)
    given = [each.key.frame for number in range(8, 30) for each in replay.take(frame(number))]
    assert given == list(range(8, 30))


# Over /api/chat


def said(number: int) -> bytes:
    return b"\x01" + spoken(number).astype("<i2").tobytes()


async def test_over_the_socket_at_another_ingress() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1")
        told = await client.live()
        assert told["resumed"] is False
        assert (told["first_frame"], told["heard_frames"]) == (0, 0)
        for number in range(6):
            client.say(said(number))
        for number in range(6):
            assert await client.hear_kind(1) == (spoken(number) + 1).astype("<i2").tobytes()
        client.vanish()
        await client.ended()
        again = there.connect(1, resume=told["resume_token"], missed="replay", have="4")
        told_again = await again.live()
        assert told_again["session"] == told["session"]
        assert told_again["seed"] == "7"
        assert told_again["resumed"] is True
        assert (told_again["first_frame"], told_again["heard_frames"]) == (4, 6)
        assert told_again["resume_token"] != told["resume_token"]
        again.say(said(6))
        for number in range(4, 7):
            assert await again.hear_kind(1) == (spoken(number) + 1).astype("<i2").tobytes()
        late = there.connect(0, resume=told["resume_token"])
        sentence, code = await late.refusal()
        assert code == 1008
        assert "resume token" in sentence
        again.hang_up()
        await again.ended()
        await there.hubs[1].close()
        assert not there.world.router.leases, "who hangs up is not waited for"
        await there.close()


async def test_who_comes_back_and_loses_patience_comes_back_again_with_the_same_token() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1")
        told = await client.live()
        client.say(said(0))
        await client.hear_kind(1)
        client.vanish()
        await client.ended()
        there.world.router.gate.clear()  # the router is away for a while
        impatient = there.connect(1, resume=told["resume_token"])
        await asyncio.sleep(0.01)
        impatient.hang_up()  # before it was told anything, and as politely as can be
        there.world.router.gate.set()
        await impatient.ended()
        assert there.hubs[1].live == 1, "its slot waits"
        lost = there.connect(1, resume=told["resume_token"])
        await lost.live()  # it is told the next token, and whether that arrives nobody knows
        lost.vanish()
        await lost.ended()
        again = there.connect(1, resume=told["resume_token"])
        told_again = await again.live()
        assert told_again["session"] == told["session"]
        again.say(said(1))
        await again.hear_kind(1)
        again.vanish()
        await again.ended()
        late = there.connect(1, resume=told["resume_token"])
        assert (await late.refusal())[1] == 1008, "it has spoken since, so it has the next one"
        last = there.connect(0, resume=told_again["resume_token"])
        await last.live()
        last.hang_up()
        await last.ended()
        await there.close()


async def test_one_message_of_audio_for_each_frame_even_if_there_is_nothing_to_hear() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0, resume="1", silence_gate="1")
        await client.live()
        client.say(b"\x01" + np.full(1920, -1, dtype="<i2").tobytes())  # answered with zeros
        assert await client.hear_kind(1) == b""
        client.hang_up()
        await client.ended()
        await there.close()


async def test_a_client_without_a_token_is_not_waited_for() -> None:
    there = ChatWorld()
    async with there.world.running():
        client = there.connect(0)
        assert "resume_token" not in await client.live()
        client.vanish()
        await client.ended()
        await there.hubs[0].close()
        assert not there.world.router.leases
        await there.close()


async def test_a_token_is_its_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    tenants = [
        {"name": name, "keys": [f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"]} for name in ("ali", "eve")
    ]
    keys.write_text(json.dumps({"tenants": tenants}))
    there = ChatWorld(Tenants.load(keys))
    async with there.world.running():
        client = there.connect(0, {"Authorization": "Bearer ali"}, resume="1")
        token = (await client.live())["resume_token"]
        client.vanish()
        await client.ended()
        thief = there.connect(0, {"Authorization": "Bearer eve"}, resume=token)
        assert (await thief.refusal())[1] == 1008
        owner = there.connect(0, {"Authorization": "Bearer ali"}, resume=token)
        assert (await owner.live())["resumed"] is True
        owner.hang_up()
        await owner.ended()
        await there.close()

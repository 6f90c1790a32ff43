"""Deaths as a client sees them: every frame once, in order, the same words as if nothing had happened."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors.errors import NoCapacity, Quarantined, StaleEpoch
from actors.journal import Journal
from actors.messages import Failed, Need
from graphs.stages import FrameKey
from serving.relocation import snapshot
from tests.failover_callers import Caller, calling
from tests.failover_fakes import TENANT, World
from tests.fake_replica import SPEC, Model, spoken


async def test_a_conversation_outlives_its_replica() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].die()
        await caller.say(30)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r1"
        assert len(caller.heard) == 60
        caller.assert_undisturbed()
        assert caller.conversation.residence.recoveries == 1
        (opened,) = world.replicas["r1"].opened
        assert opened.journal_bytes > 0


@pytest.mark.parametrize("code", ["engine_lost", "stale_epoch", "internal", "conversation_broken", "draining"])
async def test_whatever_ends_it_at_its_replica_it_goes_on(code: str) -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].lose_engine(code)
        await caller.say(10)
        caller.assert_undisturbed()
        assert len(caller.heard) == 40


async def test_what_is_said_while_there_is_no_home_is_answered_when_there_is_one() -> None:
    world = World(replicas=2)
    async with calling(world) as caller:
        await caller.say(20)
        for replica in world.replicas.values():
            replica.die()
        await caller.say(60)  # 4.8 s
        assert len(caller.heard) == 20
        world.replicas["r1"].alive = True
        await caller.say(20)  # within a second it is asked again
        caller.assert_undisturbed()
        assert len(caller.heard) == 100
        silent = [frame.key.frame for frame in caller.heard if not len(frame.pcm)]
        assert silent == list(range(silent[0], silent[-1] + 1))
        assert 20 <= silent[0] <= 22
        assert 78 <= silent[-1] <= 92
        assert all(frame.text for frame in caller.heard)  # text is never dropped


async def test_it_fails_when_the_time_is_over() -> None:
    world = World(replicas=1, recovery_s=10.0)
    async with calling(world) as caller:
        await caller.say(20)
        world.replicas["r0"].die()
        await world.pass_time(9.0)
        assert caller.error is None
        await world.pass_time(8.0)
        assert isinstance(caller.error, NoCapacity)


async def test_a_death_before_the_prompt_was_in_begins_anew() -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test") as conversation:
        await world.run(1)
        world.replicas["r0"].die()
        await world.run()
        await conversation.ready()
        assert conversation.epoch == 2
        assert world.replicas["r1"].opened[0].journal_bytes == 0
    await world.assert_nothing_is_left()


async def test_a_second_death_while_it_is_being_rebuilt() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(40)
        world.replicas["r0"].die()
        await asyncio.sleep(0)
        for _ in range(30):  # until the journal is on its way to r1
            await asyncio.sleep(0)
        assert world.replicas["r1"].inbox
        world.replicas["r1"].die()
        await caller.say(20)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r2"
        caller.assert_undisturbed()
        assert len(caller.heard) == 60


async def test_deaths_in_a_row_are_counted_and_25_frames_clear_them() -> None:
    world = World(replicas=5)
    async with calling(world) as caller:
        await caller.say(30)
        for name in ("r0", "r1", "r2"):
            world.router.seen_dead.add(name)
            world.replicas[name].die()
            await caller.say(3)
        assert [request.deaths for request in world.router.requests if request.recovery][-3:] == [0, 1, 2]
        await caller.say(30)
        world.router.seen_dead.add("r3")
        world.replicas["r3"].die()
        await caller.say(2)
        assert world.router.requests[-1].deaths == 0
        caller.assert_undisturbed()


async def test_a_quarantined_conversation_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()

    async def refuse(request: object) -> None:
        raise Quarantined("It stopped the engine twice.")

    async with calling(world) as caller:
        await caller.say(30)
        monkeypatch.setattr(world.router, "acquire", refuse)
        world.replicas["r0"].die()
        await world.run()
        assert isinstance(caller.error, Quarantined)


async def test_who_was_taken_over_elsewhere_ends() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(5)
        lease = world.router.leases[caller.conversation.session]
        lease.epoch, lease.owner = 7, "another"
        world.replicas["r0"].lose_engine("stale_epoch")
        await world.run()
        assert isinstance(caller.error, StaleEpoch)
        world.router.leases.clear()


async def test_a_replica_of_an_old_build_takes_nobody_over() -> None:
    world = World()
    world.replicas["r1"].version = 1
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].die()
        await caller.say(30)
        assert caller.conversation.residence.home is not None
        assert caller.conversation.residence.home.replica == "r2"
        assert not world.replicas["r1"].inbox
        caller.assert_undisturbed()


async def test_other_numerics_go_on_flagged() -> None:
    world = World(replicas=2)
    world.replicas["r1"].numerics = "other"
    async with calling(world) as caller:
        await caller.say(30)
        world.replicas["r0"].die()
        await caller.say(10)
        assert len(caller.heard) == 40
        assert not caller.conversation.residence.exact
        assert caller.conversation.journal.numerics_id == "other"


async def test_a_gap_in_the_answers_is_a_home_lost() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        await caller.conversation.send(spoken(10))
        await caller.conversation.send(spoken(11))
        world.replicas["r0"].work()
        world.replicas["r0"].outbox.popleft()
        world.replicas["r0"].flush()
        caller.said = 12
        await caller.say(10)
        assert caller.conversation.residence.recoveries == 1
        caller.assert_undisturbed()
        assert len(caller.heard) == 22


async def test_a_replica_that_needs_what_is_not_kept_is_a_home_lost() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        conversation = caller.conversation
        assert conversation.residence.home is not None
        conversation.residence.deliver(conversation.residence.home, Need(FrameKey(conversation.session, 1, 12), 12))
        await caller.say(10)
        assert conversation.residence.recoveries == 1
        caller.assert_undisturbed()


async def test_what_comes_late_from_a_home_that_was_left_changes_nothing() -> None:
    world = World()
    async with calling(world) as caller:
        await caller.say(10)
        conversation = caller.conversation
        old = conversation.residence.home
        assert old is not None
        world.replicas["r0"].die()
        await caller.say(5)
        answer = caller.heard[-1]
        conversation.residence.deliver(old, answer)
        conversation.residence.deliver(old, Failed(conversation.session, 1, "engine_lost", "late"))
        await caller.say(5)
        assert conversation.residence.recoveries == 1
        caller.assert_undisturbed()
        assert len(caller.heard) == 20


@pytest.mark.parametrize("turns", range(0, 60, 3))
@pytest.mark.parametrize("planned", [False, True])
async def test_closing_during_a_relocation_leaves_nothing(planned: bool, turns: int) -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test") as conversation:
        caller = Caller(world, conversation)
        await world.run()
        await caller.say(10)
        if planned:
            world.replicas["r0"].ask_to_move()
            world.replicas["r0"].flush()
        else:
            world.replicas["r0"].die()
        for turn in range(turns):
            await asyncio.sleep(0)
            if turn % 4 == 3:
                world.replicas["r1"].work(1)
                world.replicas["r1"].flush(1)
        await caller.stop()
    await world.assert_nothing_is_left()


async def test_a_grant_that_crosses_the_end_is_given_back() -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test"):
        await world.run()
        world.router.gate.clear()
        world.replicas["r0"].die()
        await world.run()
        world.router.gate.set()
    await world.assert_nothing_is_left()


def test_a_snapshot_is_the_journal_as_of_its_last_answer() -> None:
    journal, model = Journal("s", SPEC, 3.2), Model(SPEC)
    for number in range(100):
        journal.heard(number, spoken(number))
        if number < 90:
            journal.take(model.step(FrameKey("s", 1, number), spoken(number)))
    journal.control(7, "mute", [1])
    before = journal.to_bytes()
    rebuilt = Journal.from_bytes(snapshot(journal, 1.6), 1.6)
    assert rebuilt.heard_frames == rebuilt.next_frame == journal.next_frame == 90
    assert rebuilt.first_row == journal.first_row
    assert np.array_equal(rebuilt.rows.array(), journal.rows.array())
    assert np.array_equal(rebuilt.pending, journal.pending)
    assert rebuilt.controls == journal.controls
    assert rebuilt.agent_codes.start == 70
    assert rebuilt.pcm.start <= 70
    assert np.array_equal(next(rebuilt.pcm.rows(89, 90)), spoken(89))
    assert journal.to_bytes() == before

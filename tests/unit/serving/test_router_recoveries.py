"""The router about conversations whose replica died: who is rebuilt first, where, and who is not. Nothing sleeps."""

from __future__ import annotations

import asyncio

import pytest

from actors.errors import NoCapacity, Quarantined, StaleEpoch
from actors.messages import ReplicaReport
from cluster.policy.quarantine import PROBATION_S
from serving.routing import Grant, RouterConfig
from tests.unit.serving.router_stage import LEASE_S, Stage, ask, back, settle


async def test_a_recovery_goes_before_new_callers_and_into_the_reserve() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=0.0, reserve_slots=None))
    for replica in ("r1", "r2"):
        stage.start(replica, slots=2)
    await stage.call("a")
    await stage.call("b")
    with pytest.raises(NoCapacity):
        await stage.router.acquire(ask("c"))  # two slots are free, and they are r1's conversations' if it dies
    stage.not_admitting.add("r1")
    stage.report("r1")
    caller = asyncio.create_task(stage.router.acquire(ask("c", wait_s=60.0)))
    await settle()
    for session in "ab":
        moved = await stage.router.acquire(ask(session, after_epoch=1, recovery=True, avoid=("r1",)))
        assert (moved.replica, moved.epoch) == ("r2", 2)
    stage.start("r3", slots=2)
    assert not caller.done()  # r3 is the reserve now
    stage.start("r4", slots=2)
    assert (await caller).session == "c"


async def test_a_replica_that_is_late_does_not_close_the_others_by_way_of_the_reserve() -> None:
    """Its free slots are as good a reserve as ever: a recovery takes them, late or not."""
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=0.0, reserve_slots=2))
    for replica in ("r1", "r2"):
        stage.start(replica, slots=2)
    late = ReplicaReport("r1", "n1", "ws://r1", 2, "id", True, room=0)
    stage.router.report(late)
    assert (await stage.call("a")).replica == "r2"
    assert (await stage.call("b")).replica == "r2"
    with pytest.raises(NoCapacity):
        await stage.router.acquire(ask("c"))  # r1 has two slots, which are the reserve, and no room besides
    stage.not_admitting.add("r2")
    stage.report("r2")
    moved = await stage.router.acquire(ask("a", after_epoch=1, recovery=True, avoid=("r2",)))
    assert moved.replica == "r1"


async def test_a_recovery_is_not_held_up_by_its_tenants_limit_nor_by_a_full_queue() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=0.0, max_waiting=0))
    stage.start("r1", slots=1)
    await stage.call("a")
    waiting = asyncio.create_task(
        stage.router.acquire(ask("a", after_epoch=1, recovery=True, tenant_limit=1, wait_s=60.0, avoid=("r1",)))
    )
    await settle()
    stage.start("r2", slots=1)
    assert (await waiting).replica == "r2"


async def test_so_many_are_rebuilt_at_once_and_the_others_follow_in_order_as_they_come_alive() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=0.0, rebuilds_at_once=2))
    stage.start("r1")
    calls = [await stage.call(session) for session in "abcd"]
    stage.start("r2", slots=8)
    recoveries = [
        asyncio.create_task(
            stage.router.acquire(ask(call.session, after_epoch=1, recovery=True, avoid=("r1",), wait_s=60.0))
        )
        for call in calls
    ]
    await settle()
    assert [task.done() for task in recoveries] == [True, True, False, False]
    stage.hold(await recoveries[0], live=False)
    stage.hold(await recoveries[1], live=False)
    await settle()
    assert not recoveries[2].done()
    stage.hold(await recoveries[1], live=True)
    await settle()
    assert [task.done() for task in recoveries] == [True, True, True, False]
    stage.router.release("a", 2, "i1")  # one that ended makes room as well
    assert (await recoveries[3]).session == "d"


async def test_moves_are_rebuilt_one_at_a_time_and_more_at_once_the_more_of_them_wait() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=0.0, rebuilds_at_once=4))
    stage.start("r1", slots=20)
    calls = [await stage.call(f"call {number}") for number in range(20)]
    stage.router.drain("r1")
    stage.start("r2", slots=40)
    moves = [
        asyncio.create_task(stage.router.prepare(ask(call.session, after_epoch=1, wait_s=60.0))) for call in calls[:4]
    ]
    await settle()
    assert [task.done() for task in moves] == [True, False, False, False], "nobody is silent: nobody is in a hurry"
    stage.hold(await moves[0], live=False)
    await settle()
    assert not moves[1].done()
    stage.hold(await moves[0], live=True)
    await settle()
    assert [task.done() for task in moves] == [True, True, False, False]
    moves += [
        asyncio.create_task(stage.router.prepare(ask(call.session, after_epoch=1, wait_s=60.0))) for call in calls[4:]
    ]
    await settle()
    assert sum(task.done() for task in moves) == 4, "those that live, and with so many waiting three at a time"
    for task in moves:
        task.cancel()
    await asyncio.gather(*moves, return_exceptions=True)


async def test_a_replica_that_was_to_be_avoided_is_taken_after_a_while_if_there_is_no_other(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    waiting = asyncio.create_task(
        stage.router.acquire(ask("a", after_epoch=1, recovery=True, avoid=("r1",), wait_s=60.0))
    )
    await settle()
    stage.pass_s(1.5)
    assert not waiting.done()
    stage.pass_s(0.5)
    assert (await waiting).replica == "r1"


async def test_a_replica_that_has_fallen_silent_is_given_nobody_before_its_leases_run_out(stage: Stage) -> None:
    """Whoever was sent there would wait for a connection that nobody answers."""
    for replica in ("r1", "r2", "r3"):
        stage.start(replica)
    first = await stage.call("a")
    others = [replica for replica in stage.held if replica != first.replica]
    stage.pass_s(2.0, silent=(first.replica, others[0]))
    grant = await stage.router.acquire(ask("a", after_epoch=1, recovery=True))
    assert grant.replica == others[1]


async def test_a_conversation_the_router_never_heard_of_goes_on_from_the_epoch_that_its_ingress_knows() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=1.0))
    stage.start("r2")
    recovery = asyncio.create_task(stage.router.acquire(ask("a", after_epoch=1007, recovery=True)))
    await settle()
    assert not recovery.done()  # its replica may be about to report
    stage.pass_s(1.0)
    assert (await recovery).epoch == 1008


async def test_a_recovery_counts_from_the_highest_epoch_either_side_knows(stage: Stage) -> None:
    stage.start("zombie")
    stage.held["zombie"]["a"] = (3, True)
    stage.report("zombie")  # adopted by a router that has just started
    stage.start("r2")
    grant = await stage.router.acquire(ask("a", after_epoch=1005, recovery=True, avoid=("zombie",)))
    assert (grant.replica, grant.epoch) == ("r2", 1006)
    assert stage.report("zombie") == (("a", 3),)


async def test_a_lost_answer_costs_no_recovery_but_a_resumed_conversation_is_not_its_former_owners(
    stage: Stage,
) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.hold(new)
    await stage.router.commit("a", 2, "i1")  # the answer is lost, and r2 dies
    again = await stage.router.acquire(ask("a", after_epoch=1, recovery=True, avoid=("r2",)))
    assert (again.replica, again.epoch) == ("r1", 3)
    stage.hold(again)
    stage.report("r1")
    back_again = await stage.router.resume(back("a", 0, "i1"))  # its client came back, to the same ingress
    stage.hold(back_again)
    stage.report("r1")
    with pytest.raises(StaleEpoch):
        await stage.router.acquire(ask("a", after_epoch=3, recovery=True))


async def test_suspects_never_share_a_replica_and_the_condemned_get_none(stage: Stage) -> None:
    stage.start("r1", slots=8)
    for session in "abc":
        await stage.call(session)
    stage.start("r2", slots=8)

    def recovery(session: str, deaths: int) -> asyncio.Task[Grant]:
        request = ask(session, after_epoch=1, recovery=True, avoid=("r1",), deaths=deaths, wait_s=60.0)
        return asyncio.create_task(stage.router.acquire(request))

    first, second, innocent = recovery("a", 1), recovery("b", 1), recovery("c", 0)
    stage.hold(await first)
    stage.hold(await innocent)
    stage.pass_s(1.0)
    assert not second.done()
    with pytest.raises(Quarantined, match="twice"):
        await stage.router.acquire(ask("d", after_epoch=1, recovery=True, deaths=2))
    stage.start("r3", slots=8)
    assert (await second).replica == "r3"
    fourth = recovery("e", 1)
    await settle()
    assert not fourth.done()
    stage.pass_s(PROBATION_S)
    assert (await fourth).replica == "r2"  # the first has proved itself there

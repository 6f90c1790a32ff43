"""The router about moves: a second slot, a commit, and what may end one in between. Nothing sleeps."""

from __future__ import annotations

import asyncio

import pytest

from actors.errors import NoCapacity, StaleEpoch, UnknownSession
from tests.unit.serving.router_stage import LEASE_S, Stage, ask, settle


async def test_a_move_takes_a_second_slot_and_the_first_stays_in_force_until_it_is_committed(stage: Stage) -> None:
    stage.start("r1")
    old = await stage.call("a")
    stage.start("r2")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    assert (new.epoch, new.replica) == (2, "r2")
    stage.hold(new, live=False)
    assert (stage.view("r1"), stage.view("r2")) == ((1, 0, 3), (0, 1, 3))
    assert await stage.router.locate("a") == old
    assert stage.report("r1") == stage.report("r2") == ()  # neither is told to close
    assert stage.router.status().busy == 1  # one conversation, two slots
    await stage.router.commit("a", 2, "i1")
    await stage.router.commit("a", 2, "i1")  # its answer was lost
    assert await stage.router.locate("a") == new
    assert stage.report("r1") == (("a", 1),)
    assert stage.view("r1") == (0, 0, 3)  # nobody gets that slot before r1 says that it is free
    del stage.held["r1"]["a"]
    stage.report()
    assert stage.view("r1") == (0, 0, 4)


async def test_asking_again_to_move_gives_the_same_slot_or_another_if_that_one_is_to_be_avoided(stage: Stage) -> None:
    for replica in ("r1", "r2", "r3"):
        stage.start(replica)
    await stage.call("a")
    first = await stage.router.prepare(ask("a", after_epoch=1))
    assert await stage.router.prepare(ask("a", after_epoch=1)) == first
    other = await stage.router.prepare(ask("a", after_epoch=1, avoid=(first.replica,)))
    assert (first.replica, other.replica, other.epoch) == ("r2", "r3", 3)
    assert stage.view("r1") == (1, 0, 3)  # never back to where it is


async def test_a_move_that_is_given_up_leaves_the_present_home_and_its_epoch_is_never_given_again(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    old = await stage.call("a")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.router.release("a", new.epoch, "i1", opened=False)
    assert (await stage.router.locate("a"), stage.view("r2")) == (old, (0, 0, 4))
    with pytest.raises(UnknownSession, match="Stay"):
        await stage.router.commit("a", new.epoch, "i1")
    for after_epoch in (1, 2):  # the one in force, or the highest that was ever granted: both are known to be ours
        again = await stage.router.prepare(ask("a", after_epoch=after_epoch))
        assert again.epoch == 2 + after_epoch
        stage.router.release("a", again.epoch, "i1", opened=False)


async def test_a_home_that_dies_during_the_move_leaves_the_conversation_where_it_was_going(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.hold(new)
    stage.pass_s(2 * LEASE_S, silent=["r1"])
    assert await stage.router.locate("a") == new
    await stage.router.commit("a", 2, "i1")
    # An ingress that did not go over, and asks for a place instead, is told of this one.
    assert await stage.router.acquire(ask("a", after_epoch=1, recovery=True)) == new


async def test_a_conversation_that_ends_during_its_move_gives_both_slots_back(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    stage.hold(await stage.router.prepare(ask("a", after_epoch=1)))
    stage.router.release("a", 1, "i1")
    assert [stage.report("r1"), stage.report("r2")] == [(("a", 1),), (("a", 2),)]
    for replica in ("r1", "r2"):
        del stage.held[replica]["a"]
        stage.report(replica)
        assert stage.view(replica) == (0, 0, 4)


async def test_a_move_that_its_ingress_forgot_is_undone(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    old = await stage.call("a")
    stage.hold(await stage.router.prepare(ask("a", after_epoch=1)))
    stage.pass_s(stage.config.move_s - 1.0)
    assert stage.report("r2") == ()
    stage.pass_s(1.0)
    assert stage.report("r2") == (("a", 2),)
    assert await stage.router.locate("a") == old


async def test_a_move_apart_goes_to_another_node_than_the_ingress_or_nowhere(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    grant = await stage.call("a", ingress_node="node of r2")
    assert grant.node == "node of r1"
    near = ask("a", after_epoch=1, ingress_node="node of r2", apart=True)
    with pytest.raises(NoCapacity):  # only the ingress's own node has room: it had better stay
        await stage.router.prepare(near)
    assert stage.view("r2") == (0, 0, 4)
    stage.start("r3")
    assert (await stage.router.prepare(near)).node == "node of r3"


async def test_nobody_moves_what_another_ingress_carries(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    with pytest.raises(StaleEpoch):
        await stage.router.prepare(ask("a", after_epoch=1, ingress="i2"))
    with pytest.raises(UnknownSession):
        await stage.router.prepare(ask("b", after_epoch=1))
    await stage.router.prepare(ask("a", after_epoch=1))
    with pytest.raises(StaleEpoch):
        await stage.router.commit("a", 2, "i2")


async def test_a_cancelled_move_costs_the_conversation_nothing(stage: Stage) -> None:
    stage.start("r1")
    old = await stage.call("a")
    waiting = asyncio.create_task(stage.router.prepare(ask("a", after_epoch=1, wait_s=60.0)))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    stage.start("r2")
    await stage.router.prepare(ask("a", after_epoch=1))  # its answer is lost, and its ingress does not want it any more
    stage.router.abandon("a", "i1", after_epoch=1)
    assert (await stage.router.locate("a"), stage.view("r2")) == (old, (0, 0, 4))

"""The router about clients that come back: the same slot, another epoch, one use of a token. Nothing sleeps."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from actors.errors import NoCapacity, StaleEpoch, UnknownSession
from actors.messages import ReplicaReport, SlotReport
from serving.routing import RouterConfig
from tests.unit.serving.router_stage import LEASE_S, Stage, ask, back, settle


async def test_a_resume_keeps_the_slot_and_changes_epoch_serial_and_owner(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    grant = await stage.router.resume(back("a", 0))
    assert (grant.replica, grant.epoch, grant.serial) == ("r1", 2, 1)
    assert await stage.router.resume(back("a", 0)) == grant  # the answer was lost
    assert stage.view("r1") == (1, 0, 3)
    stage.pass_s(3 * LEASE_S)  # the replica goes on reporting it as before until the new owner's open is there
    assert stage.report("r1") == ()
    stage.owners["a"] = "i2"
    stage.hold(grant)
    assert stage.report("r1") == ()
    with pytest.raises(StaleEpoch, match="used"):
        await stage.router.resume(back("a", 0))
    with pytest.raises(StaleEpoch):
        stage.router.release("a", 1, "i1")  # the former owner, who is late
    assert (await stage.router.resume(back("a", 1, "i3"))).serial == 2


async def test_a_resume_needs_the_right_serial_and_the_right_tenant(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    with pytest.raises(StaleEpoch):
        await stage.router.resume(back("a", 1))
    with pytest.raises(UnknownSession):
        await stage.router.resume(back("a", 0, tenant="another"))
    with pytest.raises(UnknownSession):
        await stage.router.resume(back("b", 0))
    await stage.router.resume(back("a", 0))
    with pytest.raises(StaleEpoch):
        await stage.router.resume(back("a", 0, "i3"))


async def test_a_resume_whose_ingress_died_may_be_done_again_after_a_lease(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    await stage.router.resume(back("a", 0, "i2"))  # and i2 is gone
    stage.pass_s(LEASE_S)
    grant = await stage.router.resume(back("a", 0, "i3"))
    assert (grant.epoch, grant.serial) == (3, 1)
    stage.hold(grant)
    assert stage.report("r1") == ()


async def test_a_token_is_not_used_up_by_a_client_that_never_got_the_next_one(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    lost = await stage.router.resume(back("a", 0, "i2"))
    for ingress, epoch in (("i2", 1), ("i3", 2)):
        with pytest.raises(StaleEpoch):
            stage.router.unspend("a", epoch, ingress)
    stage.router.unspend("a", lost.epoch, "i2")  # before its replica has heard of it …
    for epoch in (3, 4, 5):  # … and as often as that happens
        again = await stage.router.resume(back("a", 0, "i3"))
        assert (again.epoch, again.serial) == (epoch, 1)
        stage.router.unspend("a", epoch, "i3")
    stage.hold(again)
    stage.router.unspend("a", again.epoch, "i3")  # … or afterwards; and the client may have got the next one after all
    assert (await stage.router.resume(back("a", 1, "i2"))).serial == 2
    assert stage.report("r1") == ()
    for used in (0, 1):
        with pytest.raises(StaleEpoch):
            await stage.router.resume(back("a", used, "i3"))


async def test_a_conversation_whose_time_to_be_resumed_ran_out_is_over_everywhere(stage: Stage) -> None:
    stage.start("r1")
    await stage.call("a")
    await stage.router.resume(back("a", 0))
    stage.held["r1"].clear()
    stage.report("r1")
    assert (stage.view("r1"), stage.router.status().busy) == ((0, 0, 4), 0)
    with pytest.raises(UnknownSession):
        await stage.router.resume(back("a", 1))


async def test_a_resume_ends_a_move_that_is_under_way(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    stage.hold(await stage.router.prepare(ask("a", after_epoch=1)))
    grant = await stage.router.resume(back("a", 0))
    assert (grant.replica, grant.epoch) == ("r1", 3)
    assert stage.report("r2") == (("a", 2),)
    with pytest.raises(StaleEpoch):
        await stage.router.commit("a", 2, "i1")


async def test_a_new_router_learns_serials_from_reports(stage: Stage) -> None:
    slot = SlotReport("a", 5, "acme", 0, "i1", serial=3)
    stage.router.report(ReplicaReport("r1", "n1", "ws://r1", 4, "id", True, (slot,)))
    with pytest.raises(StaleEpoch):
        await stage.router.resume(back("a", 2))
    # The former router may have given epochs that nobody reports: these are not given again.
    assert (await stage.router.resume(back("a", 3))).epoch > 1000


async def test_a_resume_right_after_the_routers_death_waits_for_the_report() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=1.0))
    resume = asyncio.create_task(stage.router.resume(back("a", 0)))
    await settle()
    assert not resume.done()
    stage.held["r1"], stage.slots["r1"] = {"a": (4, True)}, 4
    stage.report("r1")
    assert (await resume).replica == "r1"


async def test_who_has_just_moved_is_resumed_at_once(stage: Stage) -> None:
    """The next home has the whole journal when a move is committed, though its report does not say so yet."""
    stage.start("r1")
    await stage.call("a")
    stage.start("r2")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.hold(new, live=False)
    await stage.router.commit("a", 2, "i1")
    resumed = await asyncio.wait_for(stage.router.resume(back("a", 0, "i2")), 30)
    assert (resumed.replica, resumed.serial) == ("r2", 1)


async def test_a_resume_that_finds_its_replica_dead_leaves_the_conversation_to_who_holds_its_journal(
    stage: Stage,
) -> None:
    """A node's death takes a call's proxy and its replica: its client is back before the router misses the replica."""
    for replica in ("r1", "r2"):
        stage.start(replica)
    first = await stage.call("a")
    for ingress in ("i2", "i1"):  # another one, and the one that holds the journal
        lost = await stage.router.resume(back("a", 0, ingress))
        assert lost.replica == first.replica  # which cannot be reached
        stage.router.unspend("a", lost.epoch, ingress)
    lost = ask("a", after_epoch=1, recovery=True, avoid=(first.replica,))
    with pytest.raises(StaleEpoch):  # whom the replica has told: there somebody else has it
        await stage.router.acquire(lost)
    rebuilt = await stage.router.acquire(dataclasses.replace(lost, unreachable=True))
    assert (rebuilt.replica, rebuilt.epoch) == ("r2" if first.replica == "r1" else "r1", 4)
    with pytest.raises(StaleEpoch):  # i2 had it, and never brought it anywhere
        await stage.router.acquire(ask("a", after_epoch=2, recovery=True, unreachable=True, ingress="i2"))
    stage.hold(rebuilt)
    again = await stage.router.resume(back("a", 0, "i2"))  # either token opens: its client may have had the next one
    assert (again.replica, again.epoch) == (rebuilt.replica, 5)


async def test_a_resume_waits_until_the_conversation_has_arrived_where_its_owner_takes_it(stage: Stage) -> None:
    """Until then the replica does not know it, and its journal is nowhere but on its way."""
    for replica in ("r1", "r2"):
        stage.start(replica)
    first = await stage.call("a")
    rebuilt = await stage.router.acquire(ask("a", after_epoch=1, recovery=True, avoid=(first.replica,)))
    coming = asyncio.create_task(stage.router.resume(back("a", 0)))
    await asyncio.sleep(0.01)
    stage.hold(rebuilt, live=False)
    stage.report(rebuilt.replica)
    await asyncio.sleep(0.01)
    assert not coming.done()
    stage.hold(rebuilt)
    stage.report(rebuilt.replica)
    grant = await coming
    assert (grant.replica, grant.epoch, grant.serial) == (rebuilt.replica, 3, 1)


async def test_a_resume_does_not_wait_for_ever(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    first = await stage.call("a")
    rebuilt = await stage.router.acquire(ask("a", after_epoch=1, recovery=True, avoid=(first.replica,)))
    stage.hold(rebuilt, live=False)
    coming = asyncio.create_task(stage.router.resume(back("a", 0)))
    for _ in range(3):
        await asyncio.sleep(0)
        stage.pass_s(1.0)
        stage.report(rebuilt.replica)
    with pytest.raises(NoCapacity):
        await coming

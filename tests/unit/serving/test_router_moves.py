"""The router about conversations that live: moves, recoveries, resumes, drains, the reserve. Nothing sleeps."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from actors.errors import NoCapacity, Quarantined, StaleEpoch, UnknownReplica, UnknownSession
from actors.messages import ReplicaReport, SlotReport
from cluster.policy.quarantine import PROBATION_S
from serving.router import AcquireRequest, Grant, ResumeRequest, RouterConfig, SessionRouter

LEASE_S = 3.0


class Stage:
    """A router, its clock, and replicas that report what they really hold: session → (epoch, live)."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.now_s = 0.0
        self.config = config or RouterConfig(lease_s=LEASE_S, settle_s=0.0)
        self.router = SessionRouter(self.config, lambda: self.now_s)
        self.held: dict[str, dict[str, tuple[int, bool]]] = {}
        self.slots: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.not_admitting: set[str] = set()

    def start(self, replica: str, slots: int = 4) -> None:
        self.held[replica], self.slots[replica] = {}, slots
        self.report(replica)

    def report(self, *replicas: str) -> tuple[tuple[str, int], ...]:
        """What the last of them is told to close; nobody closes it."""
        closed: tuple[tuple[str, int], ...] = ()
        for replica in replicas or tuple(self.held):
            busy = tuple(
                SlotReport(session, epoch, "acme", slot, self.owners.get(session, "i1"), live=live)
                for slot, (session, (epoch, live)) in enumerate(self.held[replica].items())
            )
            admitting = replica not in self.not_admitting
            reply = self.router.report(
                ReplicaReport(replica, f"node of {replica}", replica, self.slots[replica], "id", admitting, busy)
            )
            closed = reply.close
        return closed

    def hold(self, grant: Grant, live: bool = True) -> None:
        """The replica has opened what was granted."""
        self.held[grant.replica][grant.session] = (grant.epoch, live)
        self.report(grant.replica)

    async def call(self, session: str, **changed: object) -> Grant:
        """A conversation, opened and live."""
        grant = await self.router.acquire(ask(session, **changed))
        self.hold(grant)
        return grant

    def pass_s(self, seconds: float, silent: Sequence[str] = ()) -> None:
        """Half a second at a time, in which all but the silent replicas report."""
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            self.report(*(replica for replica in self.held if replica not in silent))
            self.router.tick()

    def view(self, replica: str) -> tuple[int, int, int]:
        """(busy, arriving, free)"""
        found = next(view for view in self.router.replicas() if view.replica == replica)
        return found.busy, found.arriving, found.free


def ask(session: str, **changed: object) -> AcquireRequest:
    return dataclasses.replace(AcquireRequest(session, "acme", None, "i1", "elsewhere"), **changed)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def stage() -> Stage:
    return Stage()


# ---- moves ------------------------------------------------------------------------------------------------------


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


async def test_who_has_just_moved_is_resumed_at_once(stage: Stage) -> None:
    """The next home has the whole journal when a move is committed, though its report does not say so yet."""
    stage.start("r1")
    await stage.call("a")
    stage.start("r2")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.hold(new, live=False)
    await stage.router.commit("a", 2, "i1")
    resumed = await asyncio.wait_for(stage.router.resume(back("a", 0, "i2")), 1.0)
    assert (resumed.replica, resumed.serial) == ("r2", 1)


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


# ---- recoveries -------------------------------------------------------------------------------------------------


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
    recovery = asyncio.create_task(stage.router.acquire(ask("a", after_epoch=7, recovery=True)))
    await settle()
    assert not recovery.done()  # its replica may be about to report
    stage.pass_s(1.0)
    assert (await recovery).epoch == 8


async def test_a_recovery_counts_from_the_highest_epoch_either_side_knows(stage: Stage) -> None:
    stage.start("zombie")
    stage.held["zombie"]["a"] = (3, True)
    stage.report("zombie")  # adopted by a router that has just started
    stage.start("r2")
    grant = await stage.router.acquire(ask("a", after_epoch=5, recovery=True, avoid=("zombie",)))
    assert (grant.replica, grant.epoch) == ("r2", 6)
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


# ---- resumes ----------------------------------------------------------------------------------------------------


def back(session: str, serial: int, ingress: str = "i2", tenant: str = "acme") -> ResumeRequest:
    return ResumeRequest(session, serial, tenant, ingress, "elsewhere")


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
    assert (await stage.router.resume(back("a", 3))).epoch > 100


async def test_a_resume_right_after_the_routers_death_waits_for_the_report() -> None:
    stage = Stage(RouterConfig(lease_s=LEASE_S, settle_s=1.0))
    resume = asyncio.create_task(stage.router.resume(back("a", 0)))
    await settle()
    assert not resume.done()
    stage.held["r1"], stage.slots["r1"] = {"a": (4, True)}, 4
    stage.report("r1")
    assert (await resume).replica == "r1"


# ---- drains, room -----------------------------------------------------------------------------------------------


async def test_a_drained_replica_is_told_so_and_gets_nobody_and_its_conversations_go_before_new_callers(
    stage: Stage,
) -> None:
    stage.start("r1")
    await stage.call("a")
    await stage.call("b")
    with pytest.raises(UnknownReplica):
        stage.router.drain("r9")
    stage.router.drain("r1")
    view = stage.router.replicas()[0]
    assert (view.draining, view.admitting) == (True, False)
    busy = tuple(SlotReport(session, 1, "acme", slot, "i1") for slot, session in enumerate("ab"))
    assert stage.router.report(ReplicaReport("r1", "n", "r1", 4, "id", True, busy)).drain
    stage.start("r2", slots=2)
    with pytest.raises(NoCapacity):  # two slots, and two conversations that have to leave r1
        await stage.router.acquire(ask("c"))
    assert [(await stage.router.prepare(ask(s, after_epoch=1))).replica for s in "ab"] == ["r2", "r2"]


async def test_a_replica_is_forgotten_with_all_that_it_held_when_it_says_goodbye(stage: Stage) -> None:
    for replica in ("r1", "r2"):
        stage.start(replica)
    await stage.call("a")
    await stage.call("b")
    new = await stage.router.prepare(ask("a", after_epoch=1))
    stage.router.forget("r1")
    assert await stage.router.locate("a") == new
    assert await stage.router.locate("b") is None


async def test_a_replica_under_pressure_takes_nobody_new(stage: Stage) -> None:
    report = ReplicaReport("r1", "n1", "ws://r1", 4, "id", True, room=1)
    stage.router.report(report)
    await stage.router.acquire(ask("a"))
    with pytest.raises(NoCapacity):  # the one that it had room for has been given away since
        await stage.router.acquire(ask("b"))
    recovered = await stage.router.acquire(ask("c", after_epoch=3, recovery=True))
    assert recovered.replica == "r1"  # late frames are better than a lost call
    stage.router.report(dataclasses.replace(report, room=2, busy=(SlotReport("a", 1, "acme", 0, "i1"),)))
    assert stage.view("r1")[2] == 1


async def test_when_there_is_too_little_for_all_the_tenant_with_the_fewest_is_next(stage: Stage) -> None:
    stage.start("r1", slots=2)
    await stage.call("a")
    await stage.call("b")
    waiting = {
        name: asyncio.create_task(stage.router.acquire(ask(name, tenant=tenant, wait_s=60.0)))
        for name, tenant in (("big", "acme"), ("small", "tiny"))
    }
    await settle()
    stage.start("r2", slots=1)
    await settle()
    assert {name: task.done() for name, task in waiting.items()} == {"big": False, "small": True}
    stage.start("r3", slots=1)
    assert (await waiting["big"]).session == "big"

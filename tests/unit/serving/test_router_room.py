"""The router about drains, goodbyes, pressure, and whose turn it is. Nothing sleeps."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from actors.errors import NoCapacity, UnknownReplica
from actors.messages import ReplicaReport, SlotReport
from tests.unit.serving.router_stage import Stage, ask, settle


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
    for session in "ab":  # one after the other
        moving = await stage.router.prepare(ask(session, after_epoch=1))
        assert moving.replica == "r2"
        stage.hold(moving, live=True)


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

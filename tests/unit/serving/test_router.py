"""The session router: grants, queue, tenants, rebuilding after its death. Time is injected; nothing sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from actors.errors import NoCapacity, StaleEpoch, TenantLimit
from actors.messages import ReplicaReport, SlotReport
from serving.router import SessionRouter
from serving.routing import AcquireRequest, Grant, RouterConfig


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def router(clock: Clock) -> SessionRouter:
    return SessionRouter(RouterConfig(lease_s=3.0, max_waiting=2, settle_s=0.0), clock)


def report_of(
    replica: str = "r1", *busy: tuple[str, int], slots: int = 1, node: str = "n1", admitting: bool = True
) -> ReplicaReport:
    held = tuple(SlotReport(session, epoch, "acme", i, "ingress") for i, (session, epoch) in enumerate(busy))
    return ReplicaReport(replica, node, f"ws://{replica}", slots, "numerics", admitting, held)


def ask(session: str, wait_s: float = 0.0, limit: int | None = None, node: str = "n0", tenant: str = "acme"):  # type: ignore[no-untyped-def] # shorthand
    return AcquireRequest(session, tenant, limit, "ingress", node, wait_s)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    for _ in range(100):
        if true():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came true")


async def test_a_grant_names_the_replica_its_address_and_the_first_epoch(router: SessionRouter) -> None:
    router.report(report_of())
    assert await router.acquire(ask("a")) == Grant("a", 1, "r1", "ws://r1", "numerics", node="n1")


async def test_without_room_it_refuses_at_once(router: SessionRouter) -> None:
    with pytest.raises(NoCapacity):
        await router.acquire(ask("a"))
    router.report(report_of())
    await router.acquire(ask("a"))
    with pytest.raises(NoCapacity):
        await router.acquire(ask("b"))


async def test_a_replica_that_does_not_admit_gets_nobody(router: SessionRouter) -> None:
    router.report(report_of(admitting=False))
    with pytest.raises(NoCapacity):
        await router.acquire(ask("a"))


async def test_a_replica_the_caller_cannot_reach_is_avoided(router: SessionRouter) -> None:
    router.report(report_of("r1"))
    router.report(report_of("r2", slots=4))
    first = await router.acquire(ask("a"))
    assert first.replica == "r1"
    router.release("a", 1, "ingress", opened=False)
    again = AcquireRequest("a", "acme", None, "ingress", "n0", 0.0, after_epoch=1, avoid=("r1",))
    assert ((await router.acquire(again)).replica, router.status().busy) == ("r2", 1)
    with pytest.raises(NoCapacity):
        await router.acquire(AcquireRequest("b", "acme", None, "ingress", "n0", avoid=("r1", "r2")))


async def test_asking_again_gives_the_same_grant(router: SessionRouter) -> None:
    router.report(report_of())
    first = await router.acquire(ask("a"))
    assert await router.acquire(ask("a")) == first
    assert router.status().busy == 1


async def test_the_tenants_limit_counts_calls_and_callers_in_the_queue(router: SessionRouter) -> None:
    router.report(report_of())
    await router.acquire(ask("a", limit=2))
    waiting = asyncio.create_task(router.acquire(ask("b", wait_s=60.0, limit=2)))
    await settle()
    with pytest.raises(TenantLimit, match="2"):
        await router.acquire(ask("c", wait_s=60.0, limit=2))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    router.release("a", 1, "ingress")
    router.report(report_of(slots=2))
    assert (await router.acquire(ask("d", limit=1))).session == "d"


async def test_who_waits_is_served_in_order_when_room_comes(router: SessionRouter) -> None:
    waiting = [asyncio.create_task(router.acquire(ask(name, wait_s=60.0))) for name in "ab"]
    await settle()
    with pytest.raises(NoCapacity):  # the queue is full
        await router.acquire(ask("c", wait_s=60.0))
    router.report(report_of())
    assert (await waiting[0]).session == "a"
    assert not waiting[1].done()
    router.report(report_of("r2"))
    assert (await waiting[1]).replica == "r2"
    assert router.status().waiting == 0


async def test_a_wait_that_is_too_long_ends_with_no_capacity(router: SessionRouter) -> None:
    with pytest.raises(NoCapacity, match=r"0\.001 s"):
        await router.acquire(ask("a", wait_s=0.001))
    assert router.status().waiting == 0


async def test_a_caller_who_dies_in_the_queue_leaves_it(router: SessionRouter) -> None:
    waiting = asyncio.create_task(router.acquire(ask("a", wait_s=60.0)))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    router.report(report_of())
    assert (router.status().waiting, router.status().busy) == (0, 0)
    assert (await router.acquire(ask("b"))).session == "b"


async def test_a_grant_that_crosses_the_callers_death_goes_to_the_next(router: SessionRouter) -> None:
    waiting = [asyncio.create_task(router.acquire(ask(name, wait_s=60.0))) for name in "ab"]
    await settle()
    router.report(report_of())  # grants to a, whose task has not run yet …
    waiting[0].cancel()  # … and never will
    assert (await waiting[1]).session == "b"
    assert waiting[0].cancelled()
    assert router.status().busy == 1


async def test_abandoning_forgets_the_queue_and_the_lease(router: SessionRouter) -> None:
    waiting = asyncio.create_task(router.acquire(ask("a", wait_s=60.0)))
    await settle()
    router.abandon("a", "stranger")
    router.abandon("a", "ingress")
    with pytest.raises(NoCapacity):
        await waiting
    router.report(report_of())
    await router.acquire(ask("b"))
    router.abandon("b", "ingress")
    assert (await router.acquire(ask("c"))).session == "c"
    router.abandon("never heard of", "ingress")


async def test_releasing_what_one_does_not_hold_is_an_error(router: SessionRouter) -> None:
    router.report(report_of())
    await router.acquire(ask("a"))
    with pytest.raises(StaleEpoch):
        router.release("a", 1, "stranger")
    router.release("a", 1, "ingress")
    with pytest.raises(StaleEpoch):
        router.release("a", 1, "ingress")


async def test_a_released_slot_serves_the_queue_when_its_replica_has_freed_it(router: SessionRouter) -> None:
    router.report(report_of())
    await router.acquire(ask("a"))
    router.report(report_of("r1", ("a", 1)))
    waiting = asyncio.create_task(router.acquire(ask("b", wait_s=60.0)))
    await settle()
    router.release("a", 1, "ingress")
    await settle()
    assert not waiting.done()
    reply = router.report(report_of("r1", ("a", 1)))
    assert reply.close == (("a", 1),)
    assert reply.waiting == 1
    router.report(report_of())
    assert (await waiting).session == "b"


async def test_a_silent_replica_is_forgotten_and_its_leases_run_out(router: SessionRouter, clock: Clock) -> None:
    router.report(report_of())
    await router.acquire(ask("a"))
    clock.now_s = 3.0
    assert [lease.session for lease in router.tick()] == ["a"]
    assert router.status().replicas == 0
    with pytest.raises(NoCapacity):
        await router.acquire(ask("b"))


async def test_a_caller_that_died_with_its_grant_costs_its_slot_two_leases(router: SessionRouter, clock: Clock) -> None:
    router.report(report_of())
    await router.acquire(ask("a"))  # and is never heard of again
    for now_s in (1.0, 2.0, 3.0, 4.0, 5.0):
        clock.now_s = now_s
        router.report(report_of())
        router.tick()
    with pytest.raises(NoCapacity):
        await router.acquire(ask("b"))
    clock.now_s = 6.0
    router.report(report_of())
    router.tick()
    assert (await router.acquire(ask("b"))).session == "b"


async def test_a_new_router_is_rebuilt_from_reports_and_knows_every_epoch(clock: Clock) -> None:
    router = SessionRouter(RouterConfig(lease_s=3.0, settle_s=0.0), clock)
    assert router.report(report_of("r1", ("a", 4), slots=2)).close == ()
    assert router.status().busy == 1
    moved = AcquireRequest("a", "acme", None, "ingress", "n0", 0.0, after_epoch=4)
    assert (await router.acquire(moved)).epoch == 5
    with pytest.raises(StaleEpoch):
        await router.acquire(AcquireRequest("a", "acme", None, "other ingress", "n0", 0.0, after_epoch=4))


async def test_long_after_its_start_a_router_closes_what_nobody_owns(router: SessionRouter, clock: Clock) -> None:
    router.report(report_of())
    clock.now_s = 2.9
    router.report(report_of())
    clock.now_s = 3.1
    assert router.report(report_of("r1", ("ghost", 1))).close == (("ghost", 1),)


async def test_forgetting_a_replica_that_said_goodbye(router: SessionRouter) -> None:
    router.report(report_of())
    router.forget("r1")
    assert router.status().replicas == 0

"""The router as a Ray actor: refusals as values, the dead caller, and its own death in the middle of it all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import ray

from actors.errors import NoCapacity, StaleEpoch, TenantLimit, UnknownReplica, UnknownSession
from actors.messages import ReplicaReport, SlotReport
from serving.router_actor import NAME, NAMESPACE, replace_router
from serving.router_client import RouterClient
from serving.routing import AcquireRequest, ResumeRequest, RouterConfig
from tests.polling import until

CONFIG = RouterConfig(lease_s=60.0)  # nothing here runs out


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def client(cluster: None) -> Iterator[RouterClient]:
    yield RouterClient(CONFIG, ingress="i1")
    ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=True)


def ask(session: str, wait_s: float = 0.0, limit: int | None = None) -> AcquireRequest:
    return AcquireRequest(session, "acme", limit, "i1", "n0", wait_s)


def report(*busy: str, epoch: int = 1) -> ReplicaReport:
    held = tuple(SlotReport(session, epoch, "acme", i, "i1") for i, session in enumerate(busy))
    return ReplicaReport("r1", "n1", "ws://r1", 2, "numerics", True, held)


async def test_slots_are_granted_refused_and_given_back(client: RouterClient) -> None:
    with pytest.raises(NoCapacity):
        await client.acquire(ask("a"))
    await client.report(report())
    grant = await client.acquire(ask("a"))
    assert (grant.epoch, grant.address) == (1, "ws://r1")
    with pytest.raises(TenantLimit, match="limit of 1"):
        await client.acquire(ask("b", limit=1))
    await client.release("a", 1, opened=False)
    assert (await client.status()).busy == 0
    await client.release("a", 1, opened=False)  # twice: logged there, no error here


async def test_every_process_finds_the_same_router(client: RouterClient) -> None:
    other = RouterClient(CONFIG, ingress="i2")
    assert (await other.status()).incarnation == (await client.status()).incarnation


async def test_a_caller_who_dies_while_waiting_leaves_no_trace(client: RouterClient) -> None:
    await client.report(ReplicaReport("r1", "n1", "ws://r1", 0, "numerics", True))
    waiting = asyncio.create_task(client.acquire(ask("a", wait_s=30.0)))

    async def queued() -> bool:
        return (await client.status()).waiting == 1

    await until(queued, within_s=10)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await client.abandon("a")
    status = await client.status()
    assert (status.waiting, status.busy) == (0, 0)


async def test_a_move_a_resume_and_a_drain_through_the_actor(client: RouterClient) -> None:
    slot = SlotReport("a", 1, "acme", 0, "i1")
    await client.report(ReplicaReport("r1", "n1", "ws://r1", 2, "numerics", True, (slot,)))
    await client.report(ReplicaReport("r2", "n2", "ws://r2", 2, "numerics", True))
    moving = AcquireRequest("a", "acme", None, "i1", "n0", after_epoch=1)
    prepared = await client.prepare(moving)
    assert prepared.replica == "r2"
    await client.commit("a", prepared.epoch)
    with pytest.raises(UnknownSession):
        await client.commit("a", prepared.epoch + 1)
    located = await client.locate("a")
    assert located == prepared
    resumed = await client.resume(ResumeRequest("a", 0, "acme", "i2", "n0"))
    assert (resumed.replica, resumed.serial) == ("r2", 1)
    with pytest.raises(StaleEpoch):
        await client.resume(ResumeRequest("a", 0, "acme", "i3", "n0"))
    await client.drain("r2")
    assert [(view.replica, view.draining) for view in await client.replicas()] == [("r1", False), ("r2", True)]
    assert (await client.report(ReplicaReport("r2", "n2", "ws://r2", 2, "numerics", False))).drain
    with pytest.raises(UnknownReplica):
        await client.drain("r9")


async def test_a_deploy_brings_its_own_router_and_everybody_finds_it(client: RouterClient) -> None:
    await client.report(report("a", epoch=3))
    before = await client.status()
    await asyncio.to_thread(replace_router, RouterConfig(lease_s=60.0, max_waiting=0))
    after = await client.status()  # waits for the new one
    assert after.incarnation != before.incarnation
    assert (await client.report(report("a", epoch=3))).close == ()
    with pytest.raises(NoCapacity):  # with its own settings: nobody waits
        await client.acquire(AcquireRequest("b", "acme", None, "i1", "n0", wait_s=5.0, avoid=("r1",)))


async def test_a_killed_router_is_rebuilt_from_the_next_report_and_raises_epochs_from_there(
    client: RouterClient,
) -> None:
    started_ms = time.time_ns() // 1_000_000
    await client.report(report("a", epoch=3))
    before = await client.status()
    assert before.busy == 1
    ray.kill(ray.get_actor(NAME, NAMESPACE), no_restart=False)

    async def another() -> bool:
        return (await client.status()).incarnation != before.incarnation  # each call waits until one is there

    await until(another, within_s=30)
    assert (await client.report(report("a", epoch=3))).close == ()
    assert (await client.status()).busy == 1
    moved = AcquireRequest("a", "acme", None, "i1", "n0", 0.0, after_epoch=3)
    # Beyond all that the killed one can have given, be it to somebody who has not been heard of.
    assert (await client.acquire(moved)).epoch > started_ms
    assert (await client.report(report("a", epoch=3))).close == (("a", 3),)

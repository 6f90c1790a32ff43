"""The router as a Ray actor: refusals as values, the dead caller, and its own death in the middle of it all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import ray

from actors.errors import NoCapacity, TenantLimit
from actors.messages import ReplicaReport, SlotReport
from serving.router import AcquireRequest, RouterConfig
from serving.router_actor import NAME, NAMESPACE, RouterClient
from tests.polling import until

CONFIG = RouterConfig(lease_s=2.0)


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


async def test_a_killed_router_is_rebuilt_from_the_next_report_and_raises_epochs_from_there(
    client: RouterClient,
) -> None:
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
    assert (await client.acquire(moved)).epoch == 4
    assert (await client.report(report("a", epoch=3))).close == (("a", 3),)

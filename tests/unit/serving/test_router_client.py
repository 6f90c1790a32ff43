"""The router's client on a router that is dead, silent, faulty, or being looked for. No cluster."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from actors.errors import NoCapacity, StaleEpoch
from actors.messages import ReplicaReport
from serving import router_client
from serving.router_actor import Refusal
from serving.router_client import RouterClient
from serving.routing import AcquireRequest, Grant, ReportReply, RouterConfig

REPORT = ReplicaReport("r1", "n1", "ws://r1", 2, "numerics", True)
REQUEST = AcquireRequest("a", "acme", None, "i1", "n0")
GRANT = Grant("a", 1, "r1", "ws://r1", "numerics")


class Router:
    """A handle whose methods all do the same."""

    def __init__(self, does: Callable[[], Awaitable[Any]]) -> None:
        self._does = does
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def remote(*_: object) -> Awaitable[Any]:
            self.calls += 1
            return self._does()

        return SimpleNamespace(remote=remote)


async def dead() -> None:
    raise ActorDiedError


async def silent() -> None:
    await asyncio.Event().wait()


async def faulty() -> None:
    raise RayTaskError("acquire", "a traceback", ValueError("a bug"))


def says(answer: object) -> Callable[[], Awaitable[object]]:
    async def say() -> object:
        return answer

    return say


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., RouterClient]]:
    """A client of the first router, which finds the next one when it looks again."""
    made: list[RouterClient] = []

    def make(*routers: Router) -> RouterClient:
        left = list(routers)
        monkeypatch.setattr(router_client, "start_router", lambda _: left.pop(0))
        monkeypatch.setattr(router_client, "_find_or_start", lambda _: left.pop(0) if left else routers[-1])
        monkeypatch.setattr(router_client, "RETRY_EVERY_S", 0.001)
        monkeypatch.setattr(router_client, "RETRY_FOR_S", 0.05)
        made.append(RouterClient(RouterConfig(lease_s=0.02), ingress="i1"))
        return made[-1]

    yield make
    await asyncio.gather(*(each._search for each in made if each._search is not None))


async def test_a_caller_does_not_notice_that_the_router_is_another_one(client: Callable[..., RouterClient]) -> None:
    assert await client(Router(dead), Router(says(GRANT))).acquire(REQUEST) == GRANT


@pytest.mark.parametrize("does", [dead, silent])
async def test_a_router_that_stays_away_is_told_as_no_capacity_or_as_a_lost_connection(
    client: Callable[..., RouterClient], does: Callable[[], Awaitable[Any]]
) -> None:
    it = client(Router(does), Router(does))
    with pytest.raises(NoCapacity, match="cannot be reached"):
        await it.acquire(REQUEST)
    with pytest.raises(ConnectionError):
        await it.commit("a", 2)
    with pytest.raises(ConnectionError):
        await it.report(REPORT)
    await it.release("a", 1, opened=True)  # never raises
    await it.unspend("a", 1)


async def test_a_fault_of_the_router_is_no_reason_to_ask_again_nor_to_give_a_replica_up(
    client: Callable[..., RouterClient],
) -> None:
    router = Router(faulty)
    it = client(router)
    with pytest.raises(RayTaskError):
        await it.acquire(REQUEST)
    assert router.calls == 1
    with pytest.raises(ConnectionError):
        await it.report(REPORT)
    await it.abandon("a")


async def test_looking_for_the_router_holds_nothing_up(
    client: Callable[..., RouterClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Ray's head is away a look-up blocks, and live frames share this loop."""
    it = client(Router(dead))
    found, looking = threading.Event(), threading.Event()

    def blocked(_: object) -> Router:
        looking.set()
        found.wait(10)
        return Router(says(ReportReply((), 0, 3.0)))

    monkeypatch.setattr(router_client, "_find_or_start", blocked)
    start_s = time.monotonic()
    for _ in range(3):  # one search, not three
        with pytest.raises(ConnectionError):
            await it.report(REPORT)
    await asyncio.to_thread(looking.wait, 10)
    assert time.monotonic() - start_s < 5
    found.set()
    async with asyncio.timeout(30):
        while True:
            try:
                assert (await it.report(REPORT)).lease_s == 3.0
                return
            except ConnectionError:
                await asyncio.sleep(0.001)


async def test_a_refusal_comes_out_as_the_error_it_is(client: Callable[..., RouterClient]) -> None:
    with pytest.raises(StaleEpoch, match="changed hands"):
        await client(Router(says(Refusal(StaleEpoch.code, "It has changed hands.", "")))).prepare(REQUEST)

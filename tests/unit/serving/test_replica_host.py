"""A replica's heartbeat: registered, reconciled, told at once of what changes, drained in peace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from actors.errors import Draining, EngineLost, NoCapacity, StaleEpoch
from actors.messages import CloseRequest, Failed, FrameOut, Move, OpenRequest, Ready, ReplicaReport
from serving import replica_host
from serving.replica_host import HostConfig, ReplicaHost, Stages
from serving.router import SessionRouter
from serving.routing import AcquireRequest, ReportReply, RouterConfig
from serving.trunk_client import Trunk
from serving.trunk_server import TrunkConfig
from tests.actor_fakes import Bench, alone, frame_in, request
from tests.fake_clock import settle
from tests.virtual_time import in_virtual_time

TRUNK = TrunkConfig(secret="a secret of the tests", ping_s=0.5, dead_s=10.0)


class RouterLine:
    """The real router on the other side of a line that can be cut."""

    def __init__(self) -> None:
        self.router = SessionRouter(RouterConfig(lease_s=60.0))
        self.cut = False
        self.reports: list[ReplicaReport] = []
        self._news = asyncio.Event()

    async def report(self, report: ReplicaReport) -> ReportReply:
        self._news.set()
        if self.cut:
            raise ConnectionError("away")
        self.reports.append(report)
        return self.router.report(report)

    async def forget(self, replica: str) -> None:
        self.router.forget(replica)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something holds that a report can change."""
        async with asyncio.timeout(30):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def until_busy(self, count: int) -> None:
        """Wait for a report that names so many conversations."""
        await self.until(lambda: bool(self.reports) and len(self.reports[-1].busy) == count)


class Site:
    """A bench's replica under its host, with a router and an ingress's trunk."""

    def __init__(self, bench: Bench, line: RouterLine, host: ReplicaHost, trunk: Trunk) -> None:
        self.bench, self.line, self.host, self.trunk = bench, line, host, trunk

    async def open(self, open_request: OpenRequest) -> asyncio.Queue[object]:
        inbox: asyncio.Queue[object] = asyncio.Queue()
        self.trunk.attach(open_request.session, open_request.epoch, inbox.put_nowait)
        await self.trunk.send(open_request)
        return inbox


@asynccontextmanager
async def hosted(
    interval_s: float = 30.0, repair: Callable[[str | None], Awaitable[Stages]] | None = None
) -> AsyncIterator[Site]:
    """Beats are so far apart that whatever a test waits for has to come by itself."""
    bench, line = Bench(slots=2), RouterLine()
    config = HostConfig("r1", "n1", "127.0.0.1", interval_s, TRUNK)
    host = ReplicaHost(bench.replica, line, config, repair, bench.clock)
    await host.start()
    trunk = await Trunk.connect(host.report().address, "i1", TRUNK)
    try:
        yield Site(bench, line, host, trunk)
    finally:
        await trunk.close()
        await host.stop(drain_s=5.0)
        assert bench.replica.busy == 0


async def grant(line: RouterLine, session: str) -> OpenRequest:
    granted = await line.router.acquire(AcquireRequest(session, "t", None, "i1", "n0"))
    return request(session, granted.epoch)


async def test_it_registers_itself_and_tells_of_every_coming_and_going() -> None:
    async with hosted() as site:
        await site.line.until_busy(0)
        report = site.line.reports[0]
        assert (report.replica, report.node, report.slots, report.admitting) == ("r1", "n1", 2, True)
        assert report.numerics_id == "fake"
        inbox = await site.open(await grant(site.line, "a"))
        assert isinstance(await asyncio.wait_for(inbox.get(), 30), Ready)
        await site.line.until_busy(1)
        assert site.line.reports[-1].busy[0].session == "a"
        await site.trunk.send(CloseRequest("a", 1, "done"))
        await site.line.until_busy(0)


async def test_a_session_without_a_lease_is_closed() -> None:
    async with hosted(interval_s=0.01) as site:
        await site.line.until_busy(0)
        granted = await grant(site.line, "a")
        site.line.router.release("a", 1, "i1", opened=False)  # the router has forgotten it, the replica learns so
        inbox = await site.open(granted)
        async with asyncio.timeout(30):
            while not isinstance(message := await inbox.get(), Failed):
                assert isinstance(message, Ready)
        assert message.code == StaleEpoch.code  # it is told, not left waiting
        await site.line.until_busy(0)
        assert site.bench.replica.busy == 0


async def test_while_the_router_is_away_it_goes_on_and_tries_again() -> None:
    async with hosted(interval_s=0.01) as site:
        await site.line.until_busy(0)
        granted = await grant(site.line, "a")
        site.line.cut = True
        inbox = await site.open(granted)
        assert isinstance(await asyncio.wait_for(inbox.get(), 30), Ready)
        site.line.cut = False
        await site.line.until_busy(1)
        site.host.check()


async def test_the_queue_of_the_router_is_known_here_for_the_autoscaler() -> None:
    async with hosted(interval_s=0.01) as site:
        await site.line.until_busy(0)
        for session in "ab":
            await grant(site.line, session)
        waiting = asyncio.create_task(site.line.router.acquire(AcquireRequest("c", "t", None, "i1", "n0", wait_s=60.0)))
        await site.line.until(lambda: site.host.waiting == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@in_virtual_time
async def test_a_drain_takes_nobody_new_and_waits_for_those_who_talk() -> None:
    async with hosted() as site:
        await site.line.until_busy(0)
        inbox = await site.open(await grant(site.line, "a"))
        await asyncio.wait_for(inbox.get(), 30)
        await site.line.until_busy(1)
        stopping = asyncio.create_task(site.host.stop(drain_s=30.0))
        await site.line.until(lambda: not site.line.reports[-1].admitting)
        with pytest.raises(NoCapacity):
            await grant(site.line, "b")
        refused = await site.open(request("c"))
        failed = await asyncio.wait_for(refused.get(), 30)
        assert isinstance(failed, Failed)
        assert failed.code == Draining.code
        assert not stopping.done()
        await site.trunk.send(CloseRequest("a", 1, "done"))
        await asyncio.wait_for(stopping, 30)
        assert site.line.router.status().replicas == 0


async def test_a_dead_stage_makes_it_unhealthy_and_is_told_at_once() -> None:
    async with hosted() as site:
        await site.line.until_busy(0)
        inbox = await site.open(await grant(site.line, "a"))
        await asyncio.wait_for(inbox.get(), 30)
        await site.line.until_busy(1)
        site.bench.converse.errors["step"] = RuntimeError("the GPU fell off the bus")
        await site.trunk.send(frame_in("a", 0))
        failed = await asyncio.wait_for(inbox.get(), 30)
        assert isinstance(failed, Failed)
        assert failed.code == EngineLost.code
        with pytest.raises(EngineLost):
            site.host.check()
        await site.line.until_busy(0)
        assert not site.line.reports[-1].admitting


async def test_a_stage_that_dies_while_nobody_talks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_host, "PROBE_EVERY_S", 0.01)
    async with hosted() as site:
        await site.line.until_busy(0)
        assert site.line.reports[-1].admitting
        site.bench.encoder.errors["close"] = RuntimeError("the process is gone")
        await site.line.until(lambda: not site.line.reports[-1].admitting)
        with pytest.raises(EngineLost):
            site.host.check()


async def test_it_is_emptied_on_the_routers_wish_and_then_asks_to_be_replaced() -> None:
    async with hosted(interval_s=0.01) as site:
        await site.line.until_busy(0)
        inbox = await site.open(await grant(site.line, "a"))
        assert isinstance(await asyncio.wait_for(inbox.get(), 30), Ready)
        await site.line.until_busy(1)
        site.line.router.drain("r1")
        assert await asyncio.wait_for(inbox.get(), 30) == Move("a", 1, "drain")
        site.host.check()
        await site.trunk.send(CloseRequest("a", 1, "moved"))
        await site.line.until(lambda: site.bench.replica.drained)
        with pytest.raises(Draining):
            site.host.check()


async def test_what_was_moved_away_lets_a_stopping_replica_go_at_once() -> None:
    async with hosted() as site:
        await site.line.until_busy(0)
        inboxes = [await site.open(await grant(site.line, session)) for session in "ab"]
        for inbox in inboxes:
            await asyncio.wait_for(inbox.get(), 30)
        stopping = asyncio.create_task(site.host.stop(drain_s=3600.0))
        for session, inbox in zip("ab", inboxes, strict=True):
            assert isinstance(await asyncio.wait_for(inbox.get(), 30), Move)
            await site.trunk.send(CloseRequest(session, 1, "moved"))
        await asyncio.wait_for(stopping, 30)
        assert site.line.router.status().replicas == 0


async def test_it_stops_although_the_router_is_away() -> None:
    async with hosted() as site:
        await site.line.until_busy(0)

        async def away(replica: str) -> None:
            raise ConnectionError("away")

        site.line.forget = away  # type: ignore[method-assign] # a line that is cut
        await asyncio.wait_for(site.host.stop(drain_s=60.0), 30)


@in_virtual_time
async def test_a_router_that_is_away_costs_no_call_with_a_trunk_and_every_orphan() -> None:
    async with hosted(interval_s=0.01) as site:
        await site.line.until_busy(0)
        asked = replace(await grant(site.line, "a"), resumable=True)
        inbox, other = await site.open(asked), await Trunk.connect(site.host.report().address, "i2", TRUNK)
        assert isinstance(await asyncio.wait_for(inbox.get(), 30), Ready)
        lost: asyncio.Queue[object] = asyncio.Queue()
        other.attach("b", 1, lost.put_nowait)
        await other.send(replace(await grant(site.line, "b"), resumable=True))
        assert isinstance(await asyncio.wait_for(lost.get(), 30), Ready)
        await other.close()
        await site.line.until(lambda: any(slot.orphan for slot in site.line.reports[-1].busy))
        site.line.cut = True
        await site.bench.clock.advance(61.0)  # a lease is 60 s here, by the replica's own clock
        assert [slot.session for slot in site.bench.replica.report()] == ["a"]
        await site.trunk.send(frame_in("a", 0))
        assert isinstance(await asyncio.wait_for(inbox.get(), 30), FrameOut)


class Workshop:
    """Replaces a bench's stages as the actors would be replaced; each time from scratch."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.go = asyncio.Event()
        self.fails = False
        self.benches: list[Bench] = []

    async def __call__(self, failed: str | None) -> Stages:
        self.asked.append(failed)
        await self.go.wait()
        if self.fails:
            raise RuntimeError("the GPU is gone")
        self.benches.append(Bench(slots=2))
        bench = self.benches[-1]
        return bench.encoder, bench.converse, bench.decoder


async def test_a_dead_stage_is_replaced_in_place() -> None:
    workshop = Workshop()
    async with hosted(interval_s=0.01, repair=workshop) as site:
        await site.line.until_busy(0)
        inbox = await site.open(await grant(site.line, "a"))
        await asyncio.wait_for(inbox.get(), 30)
        site.bench.decoder.errors["step"] = RuntimeError("the process is gone")
        await site.trunk.send(frame_in("a", 0))
        failed = await asyncio.wait_for(inbox.get(), 30)
        assert isinstance(failed, Failed)
        await site.line.until(lambda: not site.line.reports[-1].admitting)
        site.host.check()  # Serve has nothing to do
        assert workshop.asked == ["decoder"]
        workshop.go.set()
        await site.line.until(lambda: site.line.reports[-1].admitting)
        await site.trunk.send(CloseRequest("a", 1, "it failed"))
        again = await site.open(await grant(site.line, "b"))
        assert isinstance(await asyncio.wait_for(again.get(), 30), Ready)
        await site.trunk.send(frame_in("b", 0))
        out = await asyncio.wait_for(again.get(), 30)
        assert isinstance(out, FrameOut)
        assert out.text_token == alone("b", 1)[0].text_token
        site.host.check()


async def test_what_cannot_be_repaired_is_left_to_serve() -> None:
    workshop = Workshop()
    workshop.fails = True
    async with hosted(interval_s=0.01, repair=workshop) as site:
        await site.line.until_busy(0)
        site.bench.converse.errors["close"] = RuntimeError("the process is gone")
        await site.bench.replica.probe()
        site.host.check()
        workshop.go.set()
        async with asyncio.timeout(30):
            while not site.host._tasks[0].done():
                await settle(1)
        with pytest.raises(EngineLost):
            site.host.check()


async def test_stages_that_die_again_and_again_are_not_repaired_for_ever() -> None:
    workshop = Workshop()
    workshop.go.set()
    async with hosted(repair=workshop) as site:
        bench = site.bench
        for repairs in range(1, replica_host.MOST_REPAIRS + 1):
            bench.encoder.errors["close"] = RuntimeError("again")
            await site.bench.replica.probe()
            async with asyncio.timeout(30):
                while not site.bench.replica.healthy:
                    await settle(1)
            assert len(workshop.asked) == repairs
            bench = workshop.benches[-1]
        bench.encoder.errors["close"] = RuntimeError("once too often")
        await site.bench.replica.probe()
        async with asyncio.timeout(30):
            while not site.host._tasks[0].done():
                await settle(1)
        with pytest.raises(EngineLost):
            site.host.check()
        assert len(workshop.asked) == replica_host.MOST_REPAIRS


async def test_it_may_be_stopped_in_the_middle_of_a_repair() -> None:
    async with hosted(repair=Workshop()) as site:
        site.bench.encoder.errors["close"] = RuntimeError("the process is gone")
        await site.bench.replica.probe()
        await asyncio.wait_for(site.host.stop(drain_s=60.0), 30)

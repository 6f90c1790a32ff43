"""Ingress, trunk, replicas and router as they are shipped, in one process, around arithmetic in place of a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from actors.codec_stage import DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.errors import NoCapacity, ServingError
from actors.interfaces import ReplicaSettings
from actors.messages import FrameOut, ReplicaReport
from actors.replica import Replica
from serving import pace
from serving.conversation import Conversation
from serving.replica_host import HostConfig, ReplicaHost
from serving.resume import Missed, Ticket
from serving.router import SessionRouter
from serving.routing import AcquireRequest, Grant, ReplicaView, ReportReply, ResumeRequest, RouterConfig
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.tenants import Tenant
from serving.trunk_client import TrunkPool
from serving.trunk_server import TrunkConfig
from tests.actor_fakes import Tokenizer
from tests.fake_replica import SPEC, spoken
from tests.stage_fakes import CARD, FakeDecoderLane, FakeEncoderLane, FakeEngine, Handle
from tests.virtual_time import in_virtual_time

TRUNK = TrunkConfig(secret="a secret of the tests", ping_s=0.3, dead_s=5.0)
TENANT = Tenant("acme")
SLOTS = 4
BEAT_S = 0.2
TICK_S = 0.02  # four times as fast as people speak


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FRAME_S", TICK_S)


class Line:
    """The router as its clients reach it: replicas report, the ingress `i` asks."""

    def __init__(self, router: SessionRouter, ingress: str, answer_s: float = 0.0) -> None:
        self.router = router
        self.ingress = ingress
        self._answer_s = answer_s  # what its word to an ingress takes that a move is done

    async def report(self, report: ReplicaReport) -> ReportReply:
        return self.router.report(report)

    async def forget(self, replica: str) -> None:
        self.router.forget(replica)

    async def acquire(self, request: AcquireRequest) -> Grant:
        return await self.router.acquire(request)

    async def prepare(self, request: AcquireRequest) -> Grant:
        return await self.router.prepare(request)

    async def commit(self, session: str, epoch: int) -> None:
        await self.router.commit(session, epoch, self.ingress)
        await asyncio.sleep(self._answer_s)

    async def resume(self, request: ResumeRequest) -> Grant:
        return await self.router.resume(request)

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        with suppress(ServingError):
            self.router.release(session, epoch, self.ingress, opened=opened)

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        self.router.abandon(session, self.ingress, after_epoch)

    async def locate(self, session: str) -> Grant | None:
        return await self.router.locate(session)

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return self.router.replicas()

    async def drain(self, replica: str) -> None:
        self.router.drain(replica)


class Site:
    """Replicas under their hosts, a router, and ingresses."""

    def __init__(self) -> None:
        self.router = SessionRouter(RouterConfig(lease_s=2.0, settle_s=0.0), asyncio.get_running_loop().time)
        self.hosts: dict[str, ReplicaHost] = {}
        self.replicas: dict[str, Replica] = {}
        self.stages: dict[str, tuple[Handle, Handle, Handle]] = {}
        self.pools: list[TrunkPool] = []
        self.hubs: list[ConversationHub] = []

    async def add_replica(self, name: str) -> None:
        stages = (
            Handle(EncoderStage(FakeEncoderLane(SLOTS), SLOTS)),
            Handle(EngineStage(FakeEngine(SLOTS), SLOTS, CARD)),
            Handle(DecoderStage(FakeDecoderLane(SLOTS), SLOTS, CARD)),
        )
        replica = Replica(
            *stages, slots=SLOTS, tokenizer=Tokenizer(), numerics_id="fake", settings=ReplicaSettings(window_s=0.0)
        )
        host = ReplicaHost(replica, Line(self.router, ""), HostConfig(name, f"node-{name}", "127.0.0.1", BEAT_S, TRUNK))
        await host.start()
        self.hosts[name], self.replicas[name], self.stages[name] = host, replica, stages

    def add_ingress(self, name: str, answer_s: float = 0.0) -> ConversationHub:
        pool = TrunkPool(name, TRUNK)
        hub = ConversationHub(Line(self.router, name, answer_s), pool, Place(name, "node-i"), ServeSettings())
        self.pools.append(pool)
        self.hubs.append(hub)
        return hub

    def lose_engine(self, name: str) -> None:
        for stage in self.stages[name]:
            stage.errors["step"] = RuntimeError("the actor died")

    async def kill(self, name: str) -> None:
        """Its process: nobody listens any more, and the router hears nothing."""
        host = self.hosts[name]
        for task in host._tasks[1:]:
            task.cancel()
        server = host._trunk._server
        assert server is not None
        for connection in list(server.connections):
            connection.transport.abort()
        server.close()
        await self.replicas.pop(name).stop()

    def home_of(self, conversation: Conversation) -> str:
        home = conversation.residence.home
        assert home is not None
        return home.replica

    async def all_free(self) -> bool:
        await asyncio.sleep(0.01)
        return all(not replica.busy for replica in self.replicas.values()) and self.router.status().busy == 0


@asynccontextmanager
async def site(replicas: int = 3) -> AsyncIterator[Site]:
    there = Site()
    async with AsyncExitStack() as stack:
        for i in range(replicas):
            await there.add_replica(f"r{i}")
            stack.push_async_callback(there.hosts[f"r{i}"].stop, 0.2)
        yield there
        for hub in there.hubs:
            await hub.close()
        async with asyncio.timeout(5):
            while not await there.all_free():
                pass
        for pool in there.pools:
            await pool.close()


class Caller:
    """Speaks and listens, as fast as TICK_S says."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.heard: list[FrameOut] = []
        self.late_s = 0.0  # the longest between two frames
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        last_s = 0.0
        async for frame in self.conversation.frames():
            now_s = loop.time()
            self.late_s = max(self.late_s, now_s - (last_s or now_s))
            last_s = now_s
            self.heard.append(frame)

    async def say(self, frames: int) -> None:
        """Returns when all that was said is answered."""
        for _ in range(frames):
            await self.conversation.send(spoken(self.conversation.frames_sent))
            await asyncio.sleep(TICK_S)
        async with asyncio.timeout(20):
            while len(self.heard) < self.conversation.frames_sent - self.conversation.first_frame:
                assert not self._reading.done(), self._reading
                await asyncio.sleep(0.01)

    def tokens(self) -> list[tuple[Any, ...]]:
        return [(frame.key.frame, frame.text_token, *frame.codes.tolist()) for frame in self.heard]

    def sounds(self) -> list[bytes]:
        return [frame.pcm.tobytes() for frame in self.heard]

    async def stop(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def calling(hub: ConversationHub, *, resumable: bool = False) -> AsyncIterator[Caller]:
    async with hub.open(SPEC, TENANT, "test", resumable=resumable) as conversation:
        async with asyncio.timeout(10):
            await conversation.ready()
        caller = Caller(conversation)
        try:
            yield caller
        finally:
            await caller.stop()


async def undisturbed(there: Site, hub: ConversationHub, frames: int) -> Caller:
    async with calling(hub) as caller:
        await caller.say(frames)
        return caller


@in_virtual_time
async def test_it_outlives_two_engines() -> None:
    async with site() as there:
        hub = there.add_ingress("i")
        quiet = await undisturbed(there, hub, 90)
        async with calling(hub) as caller:
            await caller.say(30)
            there.lose_engine(there.home_of(caller.conversation))
            await caller.say(30)
            there.lose_engine(there.home_of(caller.conversation))
            await caller.say(30)
            assert caller.conversation.residence.recoveries == 2
        assert caller.tokens() == quiet.tokens()
        heard = [(mine, theirs) for mine, theirs in zip(caller.sounds(), quiet.sounds(), strict=True) if mine]
        assert len(heard) > 60
        assert all(mine == theirs for mine, theirs in heard), "the codec's state was rebuilt too"


@in_virtual_time
async def test_it_outlives_a_whole_replica() -> None:
    async with site() as there:
        hub = there.add_ingress("i")
        quiet = await undisturbed(there, hub, 60)
        async with calling(hub) as caller:
            await caller.say(30)
            host = there.hosts[there.home_of(caller.conversation)]
            for connection in list(host._trunk._server.connections):  # type: ignore[union-attr] # a killed process's end
                connection.transport.abort()
            await caller.say(30)
            assert caller.conversation.residence.recoveries == 1
        assert caller.tokens() == quiet.tokens()


@pytest.mark.parametrize(("calls", "answer_s"), [(1, 0.0), (3, 0.0), (3, 2 * BEAT_S)])
@in_virtual_time
async def test_a_drain_is_not_heard(calls: int, answer_s: float) -> None:
    """Nor where the router tells the former home that it is over before it tells the ingress."""
    async with site() as there:
        hub = there.add_ingress("i", answer_s)
        quiet = await undisturbed(there, hub, 80)
        async with AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(calling(hub)) for _ in range(calls)]
            await asyncio.gather(*(caller.say(30) for caller in callers))
            former = there.home_of(callers[0].conversation)
            # On a busy machine a replica may have had no room for the third.
            moved = [there.home_of(caller.conversation) == former for caller in callers]
            there.router.drain(former)
            await asyncio.gather(*(caller.say(50) for caller in callers))
            assert all(there.home_of(caller.conversation) != former for caller in callers)
            assert not there.replicas[former].busy
            assert all(caller.conversation.residence.recoveries == 0 for caller in callers)
        for caller in callers:
            assert caller.tokens() == quiet.tokens()
            assert caller.sounds() == quiet.sounds()
        assert [caller.conversation.residence.moves for caller in callers] == moved


@in_virtual_time
async def test_it_is_resumed_at_another_ingress_after_the_first_has_died() -> None:
    async with site() as there:
        first, second = there.add_ingress("i"), there.add_ingress("j")
        quiet = await undisturbed(there, first, 60)
        entered = first.open(SPEC, TENANT, "test", resumable=True)
        conversation = await entered.__aenter__()
        await conversation.ready()
        caller = Caller(conversation)
        await caller.say(40)
        conversation.residence.end()  # its process is gone, and says nothing more to anybody
        await there.pools[0].close()
        resuming = second.resume(Ticket(conversation.session, 0), TENANT, "test", Missed(have=35, replay=True))
        async with asyncio.timeout(10):
            again = Caller(await resuming.__aenter__())
        await again.say(20)
        assert [frame.key.frame for frame in again.heard] == list(range(35, 60))
        assert caller.tokens()[:35] + again.tokens() == quiet.tokens()
        assert caller.sounds()[:35] + again.sounds() == quiet.sounds()
        there.lose_engine(there.home_of(again.conversation))
        await again.say(10)
        assert [frame.key.frame for frame in again.heard] == list(range(35, 70))
        await again.stop()
        await resuming.__aexit__(None, None, None)
        await caller.stop()
        await entered.__aexit__(None, None, None)


@pytest.mark.parametrize("ingress", [0, 1])
@in_virtual_time
async def test_a_client_that_comes_back_before_its_dead_replica_is_missed_loses_nothing(ingress: int) -> None:
    """One node took its proxy and its slot. Its journal is at the first ingress, whichever it comes back to."""
    async with site() as there:
        hubs = there.add_ingress("i"), there.add_ingress("j")
        quiet = await undisturbed(there, hubs[0], 60)
        entered = hubs[0].open(SPEC, TENANT, "test", resumable=True)
        conversation = await entered.__aenter__()
        await conversation.ready()
        caller = Caller(conversation)
        await caller.say(40)
        conversation.park()
        await entered.__aexit__(None, None, None)
        await there.kill(there.home_of(conversation))
        tries, again = 0, None
        async with asyncio.timeout(15):
            while again is None:  # as fast as it can, with the one token that it has
                tries += 1
                resuming = hubs[ingress].resume(Ticket(conversation.session, 0), TENANT, "test", Missed(40, True))
                try:
                    again = Caller(await resuming.__aenter__())
                except ServingError:
                    await asyncio.sleep(0.01)
        await again.say(20)
        assert caller.tokens() + again.tokens() == quiet.tokens()
        await again.stop()
        await resuming.__aexit__(None, None, None)
        await caller.stop()


@in_virtual_time
async def test_who_has_no_token_is_taken_at_once_after_its_ingress_has_died() -> None:
    """Every slot is taken: the next call gets in because nothing is left of the one before."""
    async with site(1) as there:
        first, second = there.add_ingress("i"), there.add_ingress("j")
        async with AsyncExitStack() as stack:
            others = [await stack.enter_async_context(calling(second)) for _ in range(SLOTS - 1)]
            entered = first.open(SPEC, TENANT, "test")
            conversation = await entered.__aenter__()
            await conversation.ready()
            caller = Caller(conversation)
            await caller.say(10)
            with pytest.raises(NoCapacity):
                await stack.enter_async_context(second.open(SPEC, TENANT, "test"))
            conversation.residence.end()  # its process is gone, and says nothing more to anybody
            await there.pools[0].close()
            async with asyncio.timeout(0.5):
                again = await stack.enter_async_context(calling(second))
            await asyncio.gather(again.say(20), *(other.say(20) for other in others))
            assert there.replicas["r0"].busy == SLOTS
            held = {report.session for report in there.replicas["r0"].report()}
            assert held == {each.conversation.session for each in (*others, again)}
            await caller.stop()
            await entered.__aexit__(None, None, None)


@in_virtual_time
async def test_many_talk_while_replicas_come_and_go() -> None:
    async with site(4) as there:
        hub = there.add_ingress("i")
        quiet = await undisturbed(there, hub, 120)
        async with AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(calling(hub)) for _ in range(4)]

            async def strike() -> None:
                await asyncio.sleep(40 * TICK_S)
                there.router.drain(there.home_of(callers[0].conversation))
                await asyncio.sleep(30 * TICK_S)
                there.lose_engine(there.home_of(callers[1].conversation))

            await asyncio.gather(strike(), *(caller.say(120) for caller in callers))
        for caller in callers:
            assert caller.tokens() == quiet.tokens()


def test_the_fakes_tell_one_past_from_another() -> None:
    """Else equal tokens above would prove nothing."""
    lanes = FakeEncoderLane(1), FakeEncoderLane(1)
    for frame in range(3):
        lanes[0].run([0], spoken(frame)[None])
    lanes[1].run([0], spoken(2)[None])
    after = [lane.run([0], spoken(3)[None]) for lane in lanes]
    assert not np.array_equal(*after)

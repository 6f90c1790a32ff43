"""Both ends of a trunk over a real socket on loopback: batching, refusals, loss, and nothing left behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from actors.errors import NoCapacity, ReplicaLost, UnknownSession
from actors.journal import Journal
from actors.messages import (
    CloseRequest,
    Down,
    DownSink,
    Failed,
    FrameIn,
    FrameOut,
    OpenRequest,
    Ready,
)
from graphs.stages import FrameKey, SessionSpec
from serving import trunk_protocol as wire
from serving.trunk_client import Trunk, TrunkPool
from serving.trunk_server import TrunkConfig, TrunkServer

CONFIG = TrunkConfig(secret="a secret of the tests", ping_s=0.2, dead_s=5.0)
PCM = np.arange(1920, dtype=np.int16)


class EchoReplica:
    """Answers each frame with its own PCM; opens are Ready at once, or refused, or slow, by their role."""

    def __init__(self) -> None:
        self.sinks: dict[tuple[str, int], DownSink] = {}
        self.journals: dict[str, Journal | None] = {}
        self.closed: list[tuple[str, str]] = []
        self.opening = asyncio.Event()
        self.changed = asyncio.Event()

    async def open(self, request: OpenRequest, sink: DownSink, journal: Journal | None = None) -> None:
        self.journals[request.session] = journal
        if request.spec.role == "full":
            raise NoCapacity("All slots are taken.")
        if request.spec.role == "bug":
            raise ZeroDivisionError
        if request.spec.role == "slow":
            self.opening.set()
            await asyncio.Event().wait()
        self.sinks[request.session, request.epoch] = sink
        sink(Ready(request.session, request.epoch, 0, 1, "hash", 1.0))

    def offer(self, frame: FrameIn) -> None:
        sink = self.sinks.get((frame.key.session, frame.key.epoch))
        if sink is None:
            raise UnknownSession("Not here.")
        if frame.key.session == "cursed":
            raise ZeroDivisionError
        zeros, row = np.zeros(8, dtype=np.int16), np.zeros(17, dtype=np.int16)
        sink(FrameOut(frame.key, frame.pcm, 3, "", zeros, zeros, row, 1.0))

    async def close(self, session: str, epoch: int, reason: str, sink: DownSink | None = None) -> None:
        self.sinks.pop((session, epoch), None)
        self.closed.append((session, reason))
        self.changed.set()

    def leave(self, session: str, epoch: int, sink: DownSink) -> None:
        assert self.sinks.pop((session, epoch), sink) == sink
        self.closed.append((session, "left"))
        self.changed.set()

    def journal(self, session: str, epoch: int) -> Journal:
        journal = self.journals.get(session)
        if journal is None:
            raise UnknownSession("Not here.")
        return journal


class Inbox:
    """A sink that can be awaited."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Down] = asyncio.Queue()

    def __call__(self, message: Down) -> None:
        self.queue.put_nowait(message)

    async def next(self) -> Down:
        return await asyncio.wait_for(self.queue.get(), 30)


class Line:
    """A server, a pool and the trunk between them."""

    def __init__(self) -> None:
        self.replica = EchoReplica()
        self.server = TrunkServer(self.replica, "r1", CONFIG)
        self.pool = TrunkPool("i1", CONFIG)
        self.address = ""

    async def trunk(self) -> Trunk:
        return await self.pool.get(self.address)

    async def open(self, session: str, role: str = "") -> Inbox:
        trunk, inbox = await self.trunk(), Inbox()
        trunk.attach(session, 1, inbox)
        await trunk.send(OpenRequest(session, 1, "t", "i1", SessionSpec("v", role, 0)))
        return inbox


@asynccontextmanager
async def line() -> AsyncIterator[Line]:
    it = Line()
    it.address = await it.server.start("127.0.0.1")
    try:
        yield it
    finally:
        await it.pool.close()
        await it.server.stop()


async def until_closed(replica: EchoReplica, count: int) -> None:
    async with asyncio.timeout(30):
        while len(replica.closed) < count:
            replica.changed.clear()
            await replica.changed.wait()


async def test_frames_there_and_back() -> None:
    async with line() as it:
        inbox = await it.open("s")
        assert isinstance(await inbox.next(), Ready)
        trunk = await it.trunk()
        for frame in range(50):
            await trunk.send(FrameIn(FrameKey("s", 1, frame), PCM + frame))
        for frame in range(50):
            out = await inbox.next()
            assert isinstance(out, FrameOut)
            assert out.key.frame == frame
            assert np.array_equal(out.pcm, PCM + frame)
        await trunk.send(CloseRequest("s", 1, "done"))
        await until_closed(it.replica, 1)
        assert it.replica.closed == [("s", "done")]


async def test_what_is_ready_travels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode_up = wire.decode_up

    def counting(data: bytes) -> list[object]:
        messages = decode_up(data)
        sizes.append(len(messages))
        return list(messages)

    monkeypatch.setattr(wire, "decode_up", counting)
    async with line() as it:
        inboxes = [await it.open(f"s{i}") for i in range(8)]
        for inbox in inboxes:
            await inbox.next()
        sizes.clear()
        trunk = await it.trunk()
        for i in range(8):
            trunk.send_nowait(FrameIn(FrameKey(f"s{i}", 1, 0), PCM))
        for inbox in inboxes:
            await inbox.next()
        assert sizes == [8]


async def test_one_connection_is_shared_and_asked_for_once() -> None:
    async with line() as it:
        first, second = await asyncio.gather(it.trunk(), it.trunk())
        assert first is second


async def test_a_refusal_and_a_bug_end_one_conversation_only() -> None:
    async with line() as it:
        good = await it.open("good")
        assert isinstance(await good.next(), Ready)
        assert await (await it.open("a", "full")).next() == Failed("a", 1, "no_capacity", "All slots are taken.")
        failed = await (await it.open("b", "bug")).next()
        assert isinstance(failed, Failed)
        assert failed.code == "internal"
        trunk = await it.trunk()
        cursed = await it.open("cursed")
        assert isinstance(await cursed.next(), Ready)
        await trunk.send(FrameIn(FrameKey("cursed", 1, 0), PCM))
        assert isinstance(await cursed.next(), Failed)
        await trunk.send(FrameIn(FrameKey("good", 1, 0), PCM))
        assert isinstance(await good.next(), FrameOut)


async def test_a_frame_for_a_session_that_is_not_there_fails_it() -> None:
    async with line() as it:
        trunk, inbox = await it.trunk(), Inbox()
        trunk.attach("ghost", 1, inbox)
        await trunk.send(FrameIn(FrameKey("ghost", 1, 0), PCM))
        failed = await inbox.next()
        assert isinstance(failed, Failed)
        assert failed.code == "unknown_session"


async def test_a_close_cancels_an_open_that_is_under_way() -> None:
    async with line() as it:
        await it.open("s", "slow")
        await asyncio.wait_for(it.replica.opening.wait(), 30)
        await (await it.trunk()).send(CloseRequest("s", 1, "changed my mind"))
        await until_closed(it.replica, 1)
        assert it.replica.sinks == {}


async def test_nobody_closes_what_another_ingress_opened() -> None:
    async with line() as it:
        inbox = await it.open("s")
        await inbox.next()
        other = TrunkPool("i2", CONFIG)
        trunk = await other.get(it.address)
        await trunk.send(CloseRequest("s", 1, "not mine"))
        await trunk.send(OpenRequest("t", 1, "t", "i2", SessionSpec("v", "full", 0)))
        mine = Inbox()
        trunk.attach("t", 1, mine)
        await mine.next()  # what came before it has been dealt with
        assert it.replica.closed == []
        await other.close()


async def test_when_an_ingress_goes_its_conversations_are_left() -> None:
    async with line() as it:
        for session in ("a", "b"):
            await (await it.open(session)).next()
        (await it.trunk())._connection.transport.abort()
        await until_closed(it.replica, 2)
        assert sorted(it.replica.closed) == [("a", "left"), ("b", "left")]


async def test_when_a_replica_goes_every_conversation_on_it_is_told() -> None:
    async with line() as it:
        inboxes = [await it.open("a"), await it.open("b")]
        for inbox in inboxes:
            await inbox.next()
        trunk = await it.trunk()
        await it.server.stop()
        for inbox in inboxes:
            failed = await inbox.next()
            assert isinstance(failed, Failed)
            assert failed.code == "replica_lost"
        with pytest.raises(ReplicaLost):
            await trunk.send(CloseRequest("a", 1, ""))
        with pytest.raises(ReplicaLost):
            trunk.attach("c", 1, Inbox())
        with pytest.raises(ReplicaLost):
            await it.trunk()


async def test_a_replica_that_falls_silent_is_found_by_its_heartbeat() -> None:
    """Nothing arrives any more and nothing is closed, as behind a partition."""
    config = TrunkConfig(secret=CONFIG.secret, ping_s=0.02, dead_s=0.1)
    replica = TrunkServer(EchoReplica(), "r1", TrunkConfig(secret=CONFIG.secret, ping_s=50, dead_s=100))
    address = await replica.start("127.0.0.1")
    trunk = await Trunk.connect(address, "i1", config)
    inbox = Inbox()
    trunk.attach("s", 1, inbox)
    trunk._connection.transport.pause_reading()  # pongs no longer arrive
    failed = await inbox.next()
    assert isinstance(failed, Failed)
    assert failed.code == "replica_lost"
    await trunk.close()
    await replica.stop()


async def test_the_secret_is_asked_for() -> None:
    async with line() as it:
        with pytest.raises(InvalidStatus, match="401"):
            await connect(it.address, proxy=None)
        pool = TrunkPool("i1", replace(CONFIG, secret="another secret altogether"))
        with pytest.raises(ReplicaLost):
            await pool.get(it.address)
        await pool.close()


@pytest.mark.parametrize("message", [b"\xc1", "text", wire.encode_batch([])])
async def test_whoever_does_not_greet_is_closed_with_a_protocol_error(message: bytes | str) -> None:
    async with (
        line() as it,
        connect(it.address, additional_headers={wire.SECRET_HEADER: CONFIG.secret}, proxy=None) as socket,
    ):
        await socket.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            await socket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1002


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pool = TrunkPool("i1", CONFIG)
    with pytest.raises(ReplicaLost):
        await pool.get(f"ws://127.0.0.1:{port}")
    await pool.close()

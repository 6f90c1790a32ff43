"""The ingress's end of a trunk with journals on it: frames pass them, and nobody waits for a replica that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from websockets.asyncio.server import ServerConnection, serve

from actors.errors import ReplicaLost
from actors.journal_parts import PART_BYTES, cut
from actors.messages import Failed, FrameIn, JournalPart, OpenRequest, Up
from graphs.stages import FrameKey, SessionSpec
from serving import trunk_client
from serving import trunk_protocol as wire
from serving.trunk_client import Trunk
from serving.trunk_server import TrunkConfig

CONFIG = TrunkConfig(secret="a secret of the tests", ping_s=0.2, dead_s=5.0)
PCM = np.zeros(1920, dtype=np.int16)


class FarEnd:
    """A replica's end that only notes what comes; it reads while `reads` is set."""

    def __init__(self, versions: tuple[int, ...] = wire.VERSIONS) -> None:
        self.versions = versions
        self.batches: list[list[Up]] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.connection: ServerConnection | None = None
        self.came = asyncio.Event()

    async def handle(self, connection: ServerConnection) -> None:
        self.connection = connection
        await connection.recv()
        await connection.send(wire.encode_hello(wire.Hello("r", self.versions)))
        async for message in connection:
            assert isinstance(message, bytes)
            self.batches.append(wire.decode_up(message))
            self.came.set()
            await self.reads.wait()

    @property
    def messages(self) -> list[Up]:
        return [message for batch in self.batches for message in batch]

    async def until(self, messages: int) -> None:
        async with asyncio.timeout(30):
            while len(self.messages) < messages:
                self.came.clear()
                await self.came.wait()


@asynccontextmanager
async def trunk_to(far: FarEnd) -> AsyncIterator[Trunk]:
    async with serve(far.handle, "127.0.0.1", 0, max_size=wire.MAX_BATCH_BYTES) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        trunk = await Trunk.connect(f"ws://127.0.0.1:{port}", "i", CONFIG)
        try:
            yield trunk
        finally:
            far.reads.set()
            await trunk.close()


async def upload(trunk: Trunk, session: str, parts: int) -> None:
    for part in cut(session, 1, bytes(parts * PART_BYTES)):
        await trunk.send(part)
    await trunk.send(OpenRequest(session, 1, "t", "i", SessionSpec("v", "", 0), journal_bytes=parts * PART_BYTES))


async def test_journals_take_turns_and_frames_pass_them() -> None:
    far = FarEnd()
    async with trunk_to(far) as trunk:
        uploads = [asyncio.create_task(upload(trunk, session, 6)) for session in ("a", "b")]
        for frame in range(20):
            await trunk.send(FrameIn(FrameKey("live", 1, frame), PCM))
            await asyncio.sleep(0.001)
        await asyncio.gather(*uploads)
        await far.until(2 * 7 + 20)
    parts = [message for message in far.messages if isinstance(message, JournalPart)]
    assert [(part.session, part.index) for part in parts[:4]] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all(sum(isinstance(message, JournalPart) for message in batch) <= 1 for batch in far.batches)
    for session in ("a", "b"):
        of_session = [message for message in far.messages if getattr(message, "session", "") == session]
        assert isinstance(of_session[-1], OpenRequest)
        assert len(of_session) == 7
    assert [m.key.frame for m in far.messages if isinstance(m, FrameIn)] == list(range(20))


async def test_a_batch_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk_client, "BATCH", 8)
    far = FarEnd()
    async with trunk_to(far) as trunk:
        for frame in range(50):
            trunk.send_nowait(FrameIn(FrameKey("s", 1, frame), PCM))
        await far.until(50)
    assert max(len(batch) for batch in far.batches) == 8
    assert [m.key.frame for m in far.messages if isinstance(m, FrameIn)] == list(range(50))


async def test_an_upload_ends_with_its_replica() -> None:
    far = FarEnd()
    async with trunk_to(far) as trunk:
        far.reads.clear()
        uploading = asyncio.create_task(upload(trunk, "a", 100))
        await far.until(1)
        assert far.connection is not None
        far.connection.transport.abort()
        with pytest.raises(ReplicaLost):
            await asyncio.wait_for(uploading, 30)
        with pytest.raises(ReplicaLost):
            await trunk.send(JournalPart("a", 1, 0, 1, b""))


async def test_an_upload_that_is_given_up_holds_nobody_back() -> None:
    far = FarEnd()
    async with trunk_to(far) as trunk:
        given_up = asyncio.create_task(upload(trunk, "a", 4))
        other = asyncio.create_task(upload(trunk, "b", 4))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait_for(other, 30)
        await far.until(5)


@pytest.mark.parametrize(("theirs", "version"), [((1,), 1), ((1, 2), 2), ((1, 2, 9), 2)])
async def test_the_version_is_what_both_speak(theirs: tuple[int, ...], version: int) -> None:
    async with trunk_to(FarEnd(theirs)) as trunk:
        assert trunk.version == version


async def test_a_conversation_that_cannot_take_a_message_is_no_other_ones_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    far, heard = FarEnd(), asyncio.Event()

    def broken(message: object) -> None:
        raise ZeroDivisionError

    async with trunk_to(far) as trunk:
        trunk.attach("a", 1, broken)
        trunk.attach("b", 1, lambda message: heard.set())
        assert far.connection is not None
        await far.connection.send(wire.encode_batch([Failed("a", 1, "internal", ""), Failed("b", 1, "internal", "")]))
        await asyncio.wait_for(heard.wait(), 30)
        trunk.detach("a", 1)
        trunk.detach("b", 1)
    assert "could not take Failed" in caplog.text

"""Journals over a trunk, both ways, beside live frames; and what either end's death leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect

from actors.journal import Journal
from actors.journal_parts import PART_BYTES, PartsBin, cut
from actors.messages import (
    CloseRequest,
    Down,
    Failed,
    FrameOut,
    JournalAsk,
    JournalPart,
    Move,
    OpenRequest,
    Ready,
    Up,
)
from graphs.stages import FrameKey
from serving import trunk_protocol as wire
from serving.trunk_link import BATCH, Outbox
from serving.trunk_server import TrunkConfig, TrunkServer
from tests.actor_fakes import Bench, alone, frame_in, heard, request
from tests.fake_clock import settle

CONFIG = TrunkConfig(secret="a secret of the tests", ping_s=5.0, dead_s=20.0)


class Ingress:
    """The other end of a trunk, by hand."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self.got: list[Down] = []

    async def send(self, *messages: Up) -> None:
        await self._socket.send(wire.encode_batch(messages))

    async def until(self, kind: type[Down], session: str = "a", more_than: int = 0) -> Down:
        """The message of a kind about a session, once there are more of them than a number."""
        async with asyncio.timeout(30):
            while len(found := [m for m in self.got if isinstance(m, kind) and owner(m)[0] == session]) <= more_than:
                data = await self._socket.recv()
                assert isinstance(data, bytes)
                self.got += wire.decode_down(data)
        return found[-1]

    async def until_lost(self) -> None:
        self._socket.transport.abort()
        await self._socket.wait_closed()


def owner(message: Down) -> tuple[str, int]:
    return message.key[:2] if hasattr(message, "key") else (message.session, message.epoch)


class Site:
    """A replica on fakes behind a real socket."""

    def __init__(self, bench: Bench, server: TrunkServer, address: str) -> None:
        self.bench, self.replica, self._server, self._address = bench, bench.replica, server, address
        self._news = asyncio.Event()
        self.replica.on_change(self._news.set)

    @asynccontextmanager
    async def ingress(self, versions: tuple[int, ...] = wire.VERSIONS) -> AsyncIterator[Ingress]:
        secret = {wire.SECRET_HEADER: CONFIG.secret}
        async with connect(self._address, additional_headers=secret, proxy=None, max_size=None) as socket:
            await socket.send(wire.encode_hello(wire.Hello("i1", versions)))
            data = await socket.recv()
            assert isinstance(data, bytes)
            wire.decode_hello(data)
            yield Ingress(socket)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def until_busy(self, slots: int) -> None:
        await self.until(lambda: self.replica.busy == slots)

    async def until_orphans(self, count: int) -> None:
        await self.until(lambda: sum(slot.orphan for slot in self.replica.report()) == count)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    async with Bench() as bench:
        server = TrunkServer(bench.replica, "r1", CONFIG)
        try:
            yield Site(bench, server, await server.start("127.0.0.1"))
        finally:
            await server.stop()


async def journal_of(frames: int, session: str = "a", padding: int = 0) -> bytes:
    """Of a conversation held elsewhere; `padding` frames that were heard and not answered make it as long as wanted."""
    async with Bench() as bench:
        await bench.open(session)
        await settle()
        await bench.talk(session, range(frames))
        journal = bench.replica.journal(session, 1)
        for frame in range(frames, frames + padding):
            journal.heard(frame, frame_in(session, frame).pcm)
        return journal.to_bytes()


def continuing(session: str, epoch: int, blob: bytes) -> OpenRequest:
    return replace(request(session, epoch), journal_bytes=len(blob))


async def test_a_conversation_goes_on_from_a_journal_that_came_in_parts_between_anothers_frames() -> None:
    blob = await journal_of(6, padding=200)
    parts = list(cut("a", 2, blob))
    assert len(parts) > 3
    async with site() as it, it.ingress() as ingress:
        await ingress.send(request("b"))
        await ingress.until(Ready, "b")
        for frame, part in enumerate(parts):
            await ingress.send(part, frame_in("b", frame))
        await ingress.send(continuing("a", 2, blob))
        ready = await ingress.until(Ready)
        assert isinstance(ready, Ready)
        assert (ready.epoch, ready.next_frame) == (2, 6)
        for frame in range(6, 9):
            await ingress.send(frame_in("a", frame, 2))
        for frame in range(3):
            await ingress.until(FrameOut, more_than=frame)
        for session, first, epoch in (("a", 6, 2), ("b", 0, 1)):
            said = Sinkful(m for m in ingress.got if isinstance(m, FrameOut) and m.key.session == session)
            assert heard(said) == alone(session, first + len(said))[first:]
            assert {m.key.epoch for m in said} == {epoch}


class Sinkful(list[Down]):
    @property
    def frames(self) -> list[FrameOut]:
        return [message for message in self if isinstance(message, FrameOut)]


@pytest.mark.parametrize("fault", ["short", "missing", "damaged", "none"])
async def test_a_journal_that_did_not_arrive_whole_ends_its_own_conversation(fault: str) -> None:
    blob = await journal_of(6, padding=200)
    parts = list(cut("a", 2, blob))
    asked = continuing("a", 2, blob)
    if fault == "short":
        asked = replace(asked, journal_bytes=len(blob) + 1)
    elif fault == "missing":
        parts = parts[:-1]
    elif fault == "damaged":
        parts[1] = replace(parts[1], data=parts[1].data[:-1] + b"\x55")
    else:
        parts = []
    async with site() as it, it.ingress() as ingress:
        await ingress.send(*parts, asked)
        failed = await ingress.until(Failed)
        assert isinstance(failed, Failed)
        assert (failed.epoch, failed.code) == (2, "bad_journal")
        assert it.replica.busy == 0
        await ingress.send(request("b"))
        await ingress.until(Ready, "b")


async def test_parts_out_of_order_are_said_at_once() -> None:
    parts = list(cut("a", 2, b"0" * (2 * PART_BYTES)))
    async with site() as it, it.ingress() as ingress:
        await ingress.send(parts[1])
        failed = await ingress.until(Failed)
        assert isinstance(failed, Failed)
        assert failed.code == "bad_journal"


async def test_what_is_half_sent_is_forgotten_with_the_close_and_with_the_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bins: list[PartsBin] = []

    class Watched(PartsBin):
        def __init__(self) -> None:
            super().__init__()
            bins.append(self)

    monkeypatch.setattr("serving.trunk_link.PartsBin", Watched)
    parts = list(cut("a", 2, b"0" * (3 * PART_BYTES)))
    async with site() as it:
        async with it.ingress() as ingress:
            await ingress.send(*parts[:2], request("b"))
            await ingress.until(Ready, "b")
            assert bins[0].held_bytes == 2 * PART_BYTES
            await ingress.send(CloseRequest("a", 2, "changed my mind"), JournalAsk("a", 2))
            await ingress.until(Failed)
            assert bins[0].held_bytes == 0
            await ingress.send(*parts[:2], frame_in("b", 0))
            await ingress.until(FrameOut, "b")
            await ingress.until_lost()
        await it.until_busy(0)
        assert len(bins) == 2, "the link's was replaced by an empty one"
        assert bins[1].held_bytes == 0


async def test_a_resumed_conversation_brings_its_journal_before_ready_and_its_frames_after() -> None:
    async with site() as it:
        async with it.ingress() as first:
            await first.send(replace(request("a"), resumable=True), request("b"))
            await first.until(Ready)
            await first.until(Ready, "b")
            for frame in range(3):
                await first.send(frame_in("a", frame))
                await first.until(FrameOut, more_than=frame)
            journal = it.replica.journal("a", 1)
            for frame in range(3, 300):  # megabytes: several batches
                journal.heard(frame, frame_in("a", frame).pcm)
            await first.until_lost()
        await it.until_busy(1)
        await it.until_orphans(1)
        async with it.ingress() as second:
            await second.send(replace(request("a", 2), adopt=True))
            await second.until(Ready)
            await second.send(frame_in("a", 3, 2))
            await second.until(FrameOut)
            mine = [message for message in second.got if owner(message) == ("a", 2)]
            kinds = [type(message) for message in mine]
            assert kinds == [JournalPart] * (len(kinds) - 2) + [Ready, FrameOut]
            assert len(kinds) > 5
            held = PartsBin()
            assert [held.add(part, 0.0) for part in mine[:-2]][-1]
            assert Journal.from_bytes(held.take("a", 2)).next_frame == 3


async def test_a_trunk_lost_in_the_middle_of_a_journal_leaves_the_conversation_to_be_resumed_again() -> None:
    async with site() as it:
        async with it.ingress() as first:
            await first.send(replace(request("a"), resumable=True))
            await first.until(Ready)
            await first.send(frame_in("a", 0))
            await first.until(FrameOut)
            journal = it.replica.journal("a", 1)
            for frame in range(1, 1000):
                journal.heard(frame, frame_in("a", frame).pcm)
            await first.until_lost()
        await it.until_orphans(1)
        for epoch in (2, 3):
            async with it.ingress() as other:
                await other.send(replace(request("a", epoch), adopt=True, resumable=True))
                await other.until(JournalPart)
                await other.until_lost()
            await it.until_orphans(1)
        async with it.ingress() as last:
            await last.send(replace(request("a", 4), adopt=True, resumable=True))
            ready = await last.until(Ready)
            assert isinstance(ready, Ready)
            assert (ready.epoch, ready.next_frame) == (4, 1)
            await last.send(CloseRequest("a", 4, "done"))
            await it.until_busy(0)


async def test_any_ingress_may_see_what_was_noted() -> None:
    async with site() as it, it.ingress() as mine, it.ingress() as other:
        await mine.send(request("a"))
        await mine.until(Ready)
        for frame in range(4):
            await mine.send(frame_in("a", frame))
            await mine.until(FrameOut, more_than=frame)
        await other.send(JournalAsk("a", 1, first_row=2), JournalAsk("a", 2), JournalAsk("x", 1))
        part = await other.until(JournalPart)
        assert isinstance(part, JournalPart)
        excerpt = Journal.from_bytes(part.data)
        assert (excerpt.is_excerpt, excerpt.first_row, excerpt.next_frame) == (True, 2, 4)
        await other.until(Failed, "x")
        failed = {(m.session, m.epoch): m.code for m in other.got if isinstance(m, Failed)}
        assert failed == {("a", 2): "unknown_session", ("x", 1): "unknown_session"}
        assert len([m for m in other.got if isinstance(m, JournalPart)]) == 1
        await other.until_lost()
        await mine.send(frame_in("a", 4))
        await mine.until(FrameOut, more_than=4)


async def test_an_ingress_of_version_1_is_not_told_what_it_does_not_know() -> None:
    async with site() as it, it.ingress((1,)) as old, it.ingress((1, 2, 3)) as new:
        for ingress, session in ((old, "a"), (new, "b")):
            await ingress.send(request(session))
            await ingress.until(Ready, session)
        it.replica.drain()
        await new.until(Move, "b")
        await old.send(frame_in("a", 0))
        await old.until(FrameOut)
        assert not [message for message in old.got if isinstance(message, Move)]


async def test_an_old_link_closes_nothing_that_a_new_one_holds() -> None:
    async with site() as it, it.ingress() as old, it.ingress() as new:
        await old.send(replace(request("a"), resumable=True))
        await old.until(Ready)
        await new.send(replace(request("a"), resumable=True))
        await new.until(Ready)
        await old.send(CloseRequest("a", 1, "the end of a trunk that was thought lost"), JournalAsk("x", 1))
        await old.until(Failed, "x")
        await settle()
        await new.send(frame_in("a", 0))
        await new.until(FrameOut)
        await new.send(CloseRequest("a", 1, "done"))
        await it.until_busy(0)


# ---- the outbox ----

PCM, CODES, ROW = np.zeros(1920, dtype=np.int16), np.zeros(8, dtype=np.int16), np.zeros(17, dtype=np.int16)


def frame_out(session: str, frame: int) -> FrameOut:
    return FrameOut(FrameKey(session, 1, frame), PCM, 3, "", CODES, CODES, ROW, 1.0)


async def test_frames_pass_parts_and_one_part_goes_into_a_batch() -> None:
    box = Outbox(limit=6400)
    for part in cut("a", 1, b"0" * (2 * PART_BYTES)):
        box.put(part)
    box.put(frame_out("a", 0))
    box.put(frame_out("b", 0))
    assert box.holds("a", 1)
    assert not box.holds("b", 1)
    first, second = await box.batch(), await box.batch()
    assert [(type(m), owner(m)[0]) for m in first] == [(FrameOut, "b"), (JournalPart, "a")]
    assert [(type(m), owner(m)[0]) for m in second] == [(JournalPart, "a"), (FrameOut, "a")]
    assert not box.holds("a", 1)
    box.put(frame_out("a", 1))
    assert len(await box.batch()) == 1
    waiting = asyncio.create_task(box.batch())
    await settle()
    assert not waiting.done()
    box.put(frame_out("a", 2))
    assert len(await waiting) == 1


async def test_a_batch_is_one_that_the_other_end_takes() -> None:
    box = Outbox(limit=6400)
    for part in cut("a", 1, b"0" * (3 * PART_BYTES)):
        box.put(part)
    for frame in range(3000):
        box.put(frame_out("ab"[frame % 2], frame))
    sent: list[Down] = []
    while len(sent) < 3003:
        batch = await box.batch()
        assert len(wire.encode_batch(batch)) < wire.MAX_BATCH_BYTES
        assert len(batch) <= 3 * BATCH
        sent += batch
    for session in "ab":
        frames = [m.key.frame for m in sent if isinstance(m, FrameOut) and m.key.session == session]
        assert frames == sorted(frames)


def test_it_is_bounded() -> None:
    box = Outbox(limit=3)
    taken = [box.put(part) for part in cut("a", 1, b"0" * (2 * PART_BYTES))]
    assert [*taken, box.put(frame_out("b", 0)), box.put(frame_out("b", 1))] == [True, True, True, False]

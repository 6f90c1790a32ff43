"""A replica that is to be emptied asks its conversations to leave; one whose stages died lives on with others."""

from __future__ import annotations

import asyncio

import pytest

from actors.errors import Draining, EngineLost
from actors.journal import Journal
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard
from tests.fake_clock import settle
from tests.unit.actors.handovers import held, rebuilt, resumable, resuming

STAGES = ["encoder", "converse", "decoder"]


async def test_a_draining_replica_asks_again_and_again_and_is_drained_when_all_have_gone() -> None:
    async with Bench() as bench:
        sinks = {session: await bench.open(session) for session in "ab"}
        await settle()
        assert not bench.replica.drained
        bench.replica.drain()
        bench.replica.drain()
        assert all([move.reason for move in sink.moves] == ["drain"] for sink in sinks.values())
        for _ in range(2):
            await bench.clock.advance(1.1)
        assert [len(sink.moves) for sink in sinks.values()] == [3, 3]
        await bench.talk("a", range(2))
        assert heard(sinks["a"]) == alone("a", 2)
        await bench.replica.close("a", 1, "moved")
        await bench.clock.advance(1.1)
        assert [len(sink.moves) for sink in sinks.values()] == [3, 4]
        assert not bench.replica.drained
        await bench.replica.close("b", 1, "moved")
        assert bench.replica.drained


@pytest.mark.parametrize("stage", STAGES)
async def test_one_that_was_opening_when_the_drain_began_is_asked_as_well(stage: str) -> None:
    async with Bench() as bench:
        pause = bench.handles[stage].pause("open")
        opening = asyncio.create_task(bench.open("a"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        bench.replica.drain()
        with pytest.raises(Draining):
            await bench.open("b")
        pause.go.set()
        sink = await opening
        await bench.clock.advance(1.1)
        assert sink.moves
        await bench.talk("a", range(2))
        assert heard(sink) == alone("a", 2)


async def test_a_draining_replica_takes_no_journal_and_lets_its_own_be_resumed() -> None:
    journal, _ = await held(3, session="c")
    async with Bench() as bench:
        sink = await resumable(bench)
        bench.replica.leave("a", 1, sink)
        bench.replica.drain()
        with pytest.raises(Draining):
            await rebuilt(bench, journal)
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        await bench.clock.advance(1.1)
        assert [move.epoch for move in second.moves] == [2]


async def test_a_move_and_a_close_in_between_steps_lose_nothing() -> None:
    """Pre-copy: the target is rebuilt from the journal of now while the source speaks on, and both say the same."""
    async with Bench() as source, Bench() as target:
        first = await source.open("a")
        await settle()
        await source.talk("a", range(5))
        source.replica.drain()
        mine = Journal.from_bytes(source.replica.journal("a", 1).to_bytes())
        await source.talk("a", range(5, 9))
        second = await rebuilt(target, mine)
        await settle()
        await target.talk("a", range(second.ready[0].next_frame, 12), epoch=2)
        await source.talk("a", range(9, 12))
        assert heard(first) == alone("a", 12)
        assert heard(second) == alone("a", 12)[5:]
        await source.replica.close("a", 1, "moved")
        assert source.replica.drained


async def test_a_replica_lives_on_with_other_stages() -> None:
    async with Bench() as bench:
        lost = await bench.open("a")
        await settle()
        await bench.talk("a", range(3))
        mine = Journal.from_bytes(bench.replica.journal("a", 1).to_bytes())
        bench.converse.errors["step"] = ConnectionError("the actor died")
        bench.replica.offer(frame_in("a", 3))
        await settle()
        assert [failed.code for failed in lost.failed] == ["engine_lost"]
        assert bench._run is not None
        await bench._run
        with pytest.raises(EngineLost):
            await rebuilt(bench, mine)
        fresh = Bench()
        bench.handles = fresh.handles
        bench.replica.revive(fresh.encoder, fresh.converse, fresh.decoder)
        bench.engine = fresh.engine
        bench._run = asyncio.create_task(bench.replica.run())
        assert (bench.replica.admitting, bench.replica.failed_stage) == (True, None)
        sink = await rebuilt(bench, mine)
        await settle()
        await bench.talk("a", range(3, 6), epoch=2)
        assert heard(lost) + heard(sink) == alone("a", 6)


async def test_what_fails_late_of_the_old_stages_says_nothing_about_the_new() -> None:
    async with Bench() as bench:
        pause = bench.encoder.pause("open", "after")
        opening = asyncio.create_task(bench.open("a"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        bench.converse.errors["close"] = ConnectionError("the actor died")
        await bench.replica.probe()
        assert bench._run is not None
        await bench._run
        fresh = Bench()
        bench.replica.revive(fresh.encoder, fresh.converse, fresh.decoder)
        bench.engine, bench._run = fresh.engine, asyncio.create_task(bench.replica.run())
        pause.go.set()
        with pytest.raises(EngineLost):
            await opening
        assert bench.replica.healthy
        sink = await bench.open("b")
        await settle()
        await bench.talk("b", range(2))
        assert heard(sink) == alone("b", 2)


async def test_only_a_dead_replica_is_revived() -> None:
    async with Bench() as bench:
        with pytest.raises(RuntimeError):
            bench.replica.revive(bench.encoder, bench.converse, bench.decoder)

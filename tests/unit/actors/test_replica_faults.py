"""Replica: who is let in, who is refused, and what each kind of failure takes with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from actors.errors import (
    BadRequest,
    Draining,
    EngineLost,
    NoCapacity,
    StaleEpoch,
)
from actors.interfaces import ReplicaSettings
from actors.messages import SlotReport
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers, request
from tests.fake_clock import settle

# ---- opening ----


async def test_no_room_is_said_at_once_and_a_freed_slot_is_room_again() -> None:
    async with Bench(slots=2) as bench:
        await bench.open("a")
        await bench.open("b")
        with pytest.raises(NoCapacity, match="All 2 slots"):
            await bench.open("c")
        await bench.replica.close("a", 1, "bye")
        sink = await bench.open("c")
        await settle()
        assert sink.ready[0].slot == 0


async def test_a_bad_role_is_refused_and_holds_no_slot() -> None:
    async with Bench(slots=1) as bench:
        with pytest.raises(BadRequest, match="shorten it"):
            await bench.open("a", role="bad")
        assert bench.replica.busy == 0
        assert not bench.encoder.stage._gate.owner(0)
        sink = await bench.open("b")
        await settle()
        await bench.talk("b", range(2))
        assert heard(sink) == alone("b", 2)


async def test_asking_again_changes_nothing_but_the_sink() -> None:
    async with Bench() as bench:
        first = await bench.open("a")
        await settle()
        await bench.talk("a", range(2))
        second = await bench.open("a")
        assert second.ready == [replace(first.ready[0], next_frame=2)], "as it is now"
        await bench.talk("a", range(2, 4))
        assert (numbers(first), numbers(second)) == ([0, 1], [2, 3])
        assert heard(first) + heard(second) == alone("a", 4)
        assert bench.replica.busy == 1


async def test_two_opens_of_the_same_conversation_at_once_take_one_slot() -> None:
    async with Bench() as bench:
        await asyncio.gather(bench.open("a"), bench.open("a"))
        assert bench.replica.busy == 1
        assert bench.encoder.calls.count("open") == 1
        with pytest.raises(BadRequest):
            await asyncio.gather(bench.open("b", role="bad"), bench.open("b", role="bad"))


async def test_a_higher_epoch_takes_over_and_a_lower_one_is_refused() -> None:
    async with Bench(slots=1) as bench:
        old = await bench.open("a", epoch=1)
        await settle()
        await bench.talk("a", range(2))
        new = await bench.open("a", epoch=2)
        assert [failed.code for failed in old.failed] == ["stale_epoch"]
        with pytest.raises(StaleEpoch):
            await bench.open("a", epoch=1)
        await bench.replica.close("a", 1, "the zombie hangs up")
        await settle()
        await bench.talk("a", range(2), epoch=2)
        assert heard(new) == alone("a", 2)
        assert bench.replica.report() == [SlotReport("a", 2, "t", 0, "ingress-1")]


async def test_a_draining_replica_keeps_its_calls_and_takes_no_others() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        bench.replica.drain()
        assert (bench.replica.admitting, bench.replica.healthy) == (False, True)
        with pytest.raises(Draining):
            await bench.open("b")
        await bench.talk("a", range(2))
        assert heard(sink) == alone("a", 2)


# ---- what goes wrong ----


@pytest.mark.parametrize("stage", ["encoder", "converse", "decoder"])
async def test_the_death_of_a_stage_is_told_to_everybody(stage: str) -> None:
    async with Bench() as bench:
        sinks = [await bench.open(session) for session in "abc"]
        await settle()
        bench.handles[stage].errors["step"] = ConnectionError("the actor died")
        bench.replica.offer(frame_in("a", 0))
        await settle()
        assert [[failed.code for failed in sink.failed] for sink in sinks] == [["engine_lost"]] * 3
        replica = bench.replica
        assert (replica.healthy, replica.admitting, replica.report(), replica.busy) == (False, False, [], 0)
        assert isinstance(replica.fault, EngineLost)
        with pytest.raises(EngineLost):
            await bench.open("d")
        with pytest.raises(EngineLost):
            replica.offer(frame_in("a", 1))
        assert bench._run is not None
        await bench._run  # ends by itself


@pytest.mark.parametrize("method", ["open", "close"])
@pytest.mark.parametrize("stage", ["encoder", "converse", "decoder"])
async def test_a_stage_may_die_while_a_call_comes_or_goes(stage: str, method: str) -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        bench.handles[stage].errors[method] = ConnectionError("the actor died")
        if method == "open":
            unopened = Sink()
            with pytest.raises(EngineLost):
                await bench.replica.open(request("b"), unopened)
            assert unopened == [], "the opener is told by the exception alone"
        else:
            await bench.open("b")
            await bench.replica.close("b", 1, "bye")
        await settle()
        assert [failed.code for failed in sink.failed] == ["engine_lost"]
        assert (bench.replica.healthy, bench.replica.busy) == (False, 0)
        assert bench._run is not None
        await bench._run


async def test_a_stage_that_never_answers_is_dead() -> None:
    async with Bench(settings=ReplicaSettings(window_s=0.0, stage_timeout_s=20.0)) as bench:
        sink = await bench.open("a")
        await settle()
        bench.converse.pause("step")
        bench.replica.offer(frame_in("a", 0))
        await settle()
        await bench.clock.advance(19.0)
        assert bench.replica.healthy
        await bench.clock.advance(1.5)
        assert [failed.code for failed in sink.failed] == ["engine_lost"]


async def test_a_conversation_that_a_stage_gives_up_ends_alone() -> None:
    async with Bench() as bench:
        sinks = {session: await bench.open(session) for session in "ab"}
        await settle()
        await bench.talk("a", range(1))
        bench.converse.stage._gate.fail("a", "its cache is damaged")
        for session in "ab":
            bench.replica.offer(frame_in(session, 1 if session == "a" else 0))
        await settle()
        assert [failed.code for failed in sinks["a"].failed] == ["conversation_broken"]
        assert heard(sinks["b"]) == alone("b", 1)
        assert bench.replica.busy == 1


async def test_a_stage_that_knows_a_later_epoch_ends_the_call() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        bench.decoder.stage.open("a", 5, 0)
        bench.replica.offer(frame_in("a", 0))
        await settle()
        assert [failed.code for failed in sink.failed] == ["stale_epoch"]


async def test_a_sink_that_raises_loses_its_own_call_only() -> None:
    class Torn(Sink):
        def __call__(self, message: object) -> None:
            raise BrokenPipeError

    async with Bench() as bench:
        other = await bench.open("b")
        await bench.replica.open(request("a"), Torn())
        await settle()
        assert [report.session for report in bench.replica.report()] == ["b"]
        await bench.talk("b", range(2))
        assert heard(other) == alone("b", 2)


async def test_a_journal_that_is_full_ends_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Bench() as bench:
        sink, other = await bench.open("a"), await bench.open("b")
        await settle()
        await bench.talk("a", range(2))
        monkeypatch.setattr("actors.journal.MAX_ROWS", 2)
        await bench.talk("a", range(2, 3))
        await bench.talk("b", range(2))
        assert [failed.code for failed in sink.failed] == ["bad_journal"]
        assert heard(other) == alone("b", 2)


async def test_stopping_tells_everybody_and_frees_everything() -> None:
    async with Bench() as bench:
        sinks = [await bench.open(session) for session in "ab"]
        await settle()
        bench.replica.offer(frame_in("a", 0))
        await bench.replica.stop()
        assert [[failed.code for failed in sink.failed] for sink in sinks] == [["draining"]] * 2
        assert (bench.replica.busy, bench.engine.open_slots) == (0, set())

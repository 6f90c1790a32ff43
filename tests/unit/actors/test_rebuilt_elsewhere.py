"""A conversation whose replica is gone is rebuilt from its journal in another one."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import JournalError
from actors.interfaces import ReplicaSettings
from actors.journal import Journal
from actors.messages import FrameOut
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers, request
from tests.fake_clock import settle
from tests.unit.actors.handovers import held, rebuilt

WHEN = ["before", "after"]


@pytest.mark.parametrize("frames", [0, 1, 7])
async def test_it_goes_on_elsewhere_as_if_nothing_had_happened(frames: int) -> None:
    journal, before = await held(frames, heard_ahead=3)
    async with Bench() as bench:
        after = await rebuilt(bench, journal)
        await settle()
        (ready,) = after.ready
        assert (ready.epoch, ready.next_frame, ready.exact, ready.numerics_id) == (2, frames, True, "fake")
        await bench.talk("a", range(frames, frames + 5), epoch=2)
        assert heard(before) + heard(after) == alone("a", frames + 5)
        assert {out.key.epoch for out in after.frames} == ({2})
        going_on = bench.replica.journal("a", 2)
        assert (going_on.next_frame, going_on.first_row) == (frames + 5, 0)
        assert going_on.pcm.start == 0


async def test_frames_may_come_as_fast_as_the_bound_on_those_in_flight_allows() -> None:
    journal, before = await held(4, heard_ahead=20)
    async with Bench() as bench:
        after = await rebuilt(bench, journal)
        await settle()
        for frame in range(4, 24):
            bench.replica.offer(frame_in("a", frame, 2))
        await settle(1000)
        assert heard(before) + heard(after) == alone("a", 24)


async def test_frames_that_are_caught_up_with_say_nothing_about_how_busy_it_is_here() -> None:
    journal, _ = await held(4)
    async with Bench() as bench:
        after = await rebuilt(bench, journal)
        await settle()
        call = bench.replica._calls.get("a")
        assert call is not None
        for frame in range(4, 24):
            bench.replica.offer(frame_in("a", frame, 2))
        await settle(1000)
        for frame in (24, 25):
            assert not call.caught_up
            await bench.clock.advance(0.08 if frame == 25 else 0.02)
            bench.replica.offer(frame_in("a", frame, 2))
            await settle()
        assert call.caught_up
        assert len(after.frames) == 22
        fresh = await bench.open("b")
        await settle()
        assert fresh.ready
        assert getattr(bench.replica._calls.get("b"), "caught_up", False)


async def test_a_neighbour_talks_on_while_another_is_rebuilt() -> None:
    journal, before = await held(40)
    async with Bench(settings=ReplicaSettings(window_s=0.0, rebuild_live_s=0.0)) as bench:
        neighbour = await bench.open("b")
        await settle()
        rebuilding = asyncio.create_task(rebuilt(bench, journal))
        for frame in range(10):
            bench.replica.offer(frame_in("b", frame))
            while len(neighbour.frames) <= frame:
                await settle(1)
            if frame == 3:
                assert "a" not in [slot.session for slot in bench.replica.report() if slot.live], "it takes longer"
        after = await rebuilding
        await settle(1000)
        await bench.talk("a", range(40, 45), epoch=2)
        assert heard(neighbour) == alone("b", 10)
        assert heard(before) + heard(after) == alone("a", 45)


async def test_it_is_not_ready_before_all_three_stages_stand_where_it_stood() -> None:
    journal, _ = await held(5)
    for stage in ("encoder", "decoder"):
        async with Bench(slots=1) as bench:
            pause = bench.handles[stage].pause("rebuild")
            sink = await rebuilt(bench, journal)
            await settle()
            assert (sink.ready, bench.replica.report()[0].live) == ([], False)
            pause.go.set()
            await settle()
            assert len(sink.ready) == 1
            assert bench.replica.report()[0].live


async def test_a_frame_that_comes_early_is_answered_when_the_rebuild_is_done() -> None:
    journal, before = await held(5)
    async with Bench() as bench:
        pause = bench.decoder.pause("rebuild")
        after = await rebuilt(bench, journal)
        for frame in (5, 6):
            bench.replica.offer(frame_in("a", frame, 2))
        bench.replica.offer(frame_in("a", 9, 2))
        assert [need.need_frame for need in after.needs] == [7]
        pause.go.set()
        await settle()
        assert heard(before) + heard(after) == alone("a", 7)


async def test_other_numerics_are_said_and_other_weights_refused() -> None:
    journal, _ = await held(3)
    async with Bench() as bench:
        bench.replica.numerics_id = "w1-bf16+mimi-w1-cpu"
        journal.numerics_id = "w1-fp8+mimi-w1-cpu"
        sink = await rebuilt(bench, journal)
        await settle()
        assert [ready.exact for ready in sink.ready] == [False]
        await bench.replica.close("a", 2, "done")
        journal.numerics_id = "w2-bf16+mimi-w2-cpu"
        with pytest.raises(JournalError, match="another checkpoint"):
            await rebuilt(bench, journal)
        assert bench.replica.busy == 0


async def test_a_journal_that_is_not_this_conversations_is_refused() -> None:
    journal, _ = await held(3)
    async with Bench() as bench:
        with pytest.raises(JournalError, match="another conversation's"):
            await bench.replica.open(request("b"), Sink(), journal)
        with pytest.raises(JournalError, match="another conversation's"):
            await bench.replica.open(request("a", role="other"), Sink(), journal)
        with pytest.raises(JournalError, match="excerpt"):
            await bench.replica.open(request("a"), Sink(), journal.excerpt(0))
        journal.prompt_hash = "of another voice"
        with pytest.raises(JournalError, match="voice or role"):
            await bench.replica.open(request("a"), Sink(), journal)
        await settle()
        assert (bench.replica.busy, bench.engine.open_slots) == (0, set())


async def test_codes_that_the_decoder_would_die_of_are_refused() -> None:
    journal, _ = await held(3)
    journal.agent_codes.fill(0, journal.agent_codes.array() * 0 - 5)
    async with Bench() as bench:
        neighbour = await bench.open("b")
        with pytest.raises(JournalError, match="codec"):
            await rebuilt(bench, journal)
        await settle()
        await bench.talk("b", range(2))
        assert heard(neighbour) == alone("b", 2)
        assert bench.replica.busy == 1


async def test_a_stream_that_is_rebuilt_before_its_call_is_open_counts() -> None:
    """Another call's rebuild works on it as soon as its own stage has opened, and the other two may still be at it."""
    (one, _), (two, _) = await held(20), await held(2, session="b")
    async with Bench(settings=ReplicaSettings(window_s=0.0, rebuild_idle_s=0.0)) as bench:  # a frame a turn
        first = await rebuilt(bench, one)
        engine = bench.converse.pause("open", "after")
        opening = asyncio.create_task(rebuilt(bench, two))
        await asyncio.wait_for(engine.reached.wait(), 30)
        while not first.ready:
            await settle(1)
        assert not opening.done()
        engine.go.set()
        second = await opening
        await settle()
        assert second.ready


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_all_of_one_death_are_rebuilt_at_once(seed: int) -> None:
    rng = random.Random(seed)

    async def scenario() -> None:
        sessions = "abcd"[: rng.randint(2, 4)]
        lost = {session: await held(rng.randrange(12), session) for session in sessions}
        async with Bench(prompt_steps=rng.randint(1, 5), turns=lambda: rng.randrange(6)) as bench:
            opening = {}
            for session, (journal, _) in lost.items():
                opening[session] = asyncio.create_task(rebuilt(bench, journal))
                await settle(rng.randrange(40))
            sinks = {session: await task for session, task in opening.items()}
            async with asyncio.timeout(30):
                while not all(sink.ready for sink in sinks.values()):
                    await settle(5)
            for session, sink in sinks.items():
                first = sink.ready[0].next_frame
                await bench.talk(session, range(first, first + 3), epoch=2)
                await settle()
                assert heard(lost[session][1]) + heard(sink) == alone(session, first + 3)

    asyncio.run(scenario())


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("method", ["open", "rebuild"])
@pytest.mark.parametrize("stage", ["encoder", "decoder"])
async def test_whoever_asked_may_go_in_the_middle_of_a_rebuild(stage: str, method: str, when: str) -> None:
    journal, _ = await held(5)
    async with Bench(slots=1) as bench:
        pause = bench.handles[stage].pause(method, when)
        opening = asyncio.create_task(rebuilt(bench, journal))
        await asyncio.wait_for(pause.reached.wait(), 30)
        await settle()
        closing = None
        if opening.done():
            closing = asyncio.create_task(bench.replica.close("a", 2, "gone"))
        else:
            opening.cancel()
        await settle()
        assert bench.replica.report() == []
        pause.go.set()
        await settle()
        if closing is not None:
            await closing
        assert (bench.replica.busy, bench.engine.open_slots) == (0, set())
        heir = await bench.open("c")
        await settle()
        await bench.talk("c", range(3))
        assert heard(heir) == alone("c", 3)


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
async def test_a_stage_may_die_of_a_rebuild(stage: str) -> None:
    journal, _ = await held(5)
    async with Bench() as bench:
        bench.handles[stage].errors["rebuild"] = ConnectionError("the actor died")
        sink = await rebuilt(bench, journal)
        await settle()
        assert [failed.code for failed in sink.failed] == ["engine_lost"]
        assert (bench.replica.healthy, bench.replica.failed_stage) == (False, stage)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_any_number_of_deaths_at_any_frame_cost_no_frame(seed: int) -> None:
    """An ingress with a journal of its own, replicas that die under it, neighbours that talk: what it heard in the end
    is what it would have heard undisturbed."""
    rng = random.Random(seed)

    async def scenario() -> None:
        mine = Journal("a", request("a").spec)
        answers: list[FrameOut] = []
        for epoch in range(1, 5):
            async with Bench(prompt_steps=2, turns=lambda: rng.randrange(4)) as bench:
                neighbours = {name: await bench.open(name) for name in "bc"[: rng.randrange(3)]}
                if epoch == 1:
                    sink = await bench.open("a")
                else:
                    sink = await rebuilt(bench, mine, epoch)
                while not (sink.ready and all(other.ready for other in neighbours.values())):
                    await settle(5)
                (ready,) = sink.ready
                mine.begin(ready.prompt_hash, ready.prompt_frames, ready.numerics_id)
                assert ready.next_frame == mine.next_frame
                frames = mine.next_frame + rng.randrange(6)
                for frame in range(mine.next_frame, frames):
                    mine.heard(frame, frame_in("a", frame).pcm)
                    bench.replica.offer(frame_in("a", frame, epoch))
                    for name in neighbours:
                        bench.replica.offer(frame_in(name, frame - ready.next_frame))
                    await settle(rng.randrange(30))
                for out in sink.frames:  # and then it dies, perhaps with frames under way
                    if mine.take(out):
                        answers.append(out)
            for name, other in neighbours.items():
                assert heard(other) == alone(name, len(other.frames))
        collected = Sink(answers)
        assert heard(collected) == alone("a", len(answers))
        assert numbers(collected) == list(range(mine.next_frame))

    asyncio.run(scenario())

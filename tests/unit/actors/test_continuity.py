"""A conversation changes hands: rebuilt from its journal elsewhere, resumed by its client, or asked to leave."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import Draining, EngineLost, JournalError, StaleEpoch, UnknownSession
from actors.interfaces import ReplicaSettings
from actors.journal import Journal
from actors.messages import Failed, FrameOut, JournalPart, Move, OpenRequest, Ready, SlotReport
from actors.tenure import ROUTER_AWAY_S
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers, request, settle

STAGES = ["encoder", "converse", "decoder"]
WHEN = ["before", "after"]


async def held(frames: int, session: str = "a", heard_ahead: int = 0) -> tuple[Journal, Sink]:
    """What an ingress has of a conversation whose replica is gone: its journal, off a trunk, and what it heard."""
    async with Bench() as bench:
        sink = await bench.open(session)
        await settle()
        await bench.talk(session, range(frames))
        journal = bench.replica.journal(session, 1)
        for frame in range(frames, frames + heard_ahead):
            journal.heard(frame, frame_in(session, frame).pcm)
        return Journal.from_bytes(journal.to_bytes()), sink


async def rebuilt(bench: Bench, journal: Journal, epoch: int = 2) -> Sink:
    sink = Sink()
    blob = journal.to_bytes()
    asked = replace(request(journal.session, epoch), journal_bytes=len(blob))
    await bench.replica.open(asked, sink, Journal.from_bytes(blob))
    return sink


def resuming(session: str, epoch: int, ingress: str = "ingress-2") -> OpenRequest:
    return replace(request(session, epoch), ingress=ingress, adopt=True, resumable=True, serial=epoch)


async def resumable(bench: Bench, session: str = "a") -> Sink:
    sink = Sink()
    await bench.replica.open(replace(request(session), resumable=True), sink)
    await settle()
    return sink


# ---- rebuilt from a journal ----


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


async def test_what_was_said_before_a_resume_says_nothing_about_how_busy_it_is_here() -> None:
    async with Bench() as bench:
        sink = await resumable(bench)
        await bench.talk("a", range(4))
        call = bench.replica._calls.get("a")
        assert call is not None
        assert call.caught_up
        bench.replica.leave("a", 1, sink)
        await bench.clock.advance(2.0)
        back = Sink()
        await bench.replica.open(resuming("a", 2), back)
        for frame in range(4, 24):
            bench.replica.offer(frame_in("a", frame, 2))
            assert not call.caught_up
        await settle(1000)
        await bench.clock.advance(0.08)
        bench.replica.offer(frame_in("a", 24, 2))
        assert call.caught_up
        await settle()
        assert len(back.frames) == 21


async def test_a_client_without_a_token_that_lost_its_ingress_is_let_in_again_where_it_was() -> None:
    async with Bench() as bench:
        sinks = {session: await bench.open(session) for session in "abc"}
        await settle()
        for frame in range(60):
            for session in sinks:
                bench.replica.offer(frame_in(session, frame))
            await bench.clock.advance(0.1)  # longer than a frame may take
            await settle(200)
        assert bench.replica.room == 0
        await bench.replica.close("a", 1, "it hung up")
        assert bench.replica.room == 0
        bench.replica.leave("b", 1, sinks["b"])
        await settle()
        assert bench.replica.room == 1
        await bench.open("again")
        assert bench.replica.room == 0


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
        await asyncio.wait_for(engine.reached.wait(), 5)
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
            async with asyncio.timeout(10):
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
        await asyncio.wait_for(pause.reached.wait(), 5)
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


# ---- resumed ----


async def test_a_lost_trunk_ends_what_cannot_be_resumed_and_keeps_what_can() -> None:
    async with Bench() as bench:
        doomed, kept = await bench.open("b"), await resumable(bench)
        for session, sink in (("a", kept), ("b", doomed)):
            bench.replica.leave(session, 1, Sink())  # another trunk's loss
            bench.replica.leave(session, 0, sink)
            await settle()
            assert session in [slot.session for slot in bench.replica.report()]
            bench.replica.leave(session, 1, sink)
        await settle()
        assert bench.replica.report() == [SlotReport("a", 1, "t", 1, "ingress-1", 0, True, True)]
        assert not kept.failed
        assert not doomed.failed


async def test_it_is_resumed_with_its_state_by_another_ingress() -> None:
    async with Bench() as bench:
        first = await resumable(bench)
        await bench.talk("a", range(4))
        bench.replica.offer(frame_in("a", 4))  # under way when the trunk is lost
        bench.replica.leave("a", 1, first)
        await settle()
        assert numbers(first) == [0, 1, 2, 3]
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        kinds = [type(message) for message in second]
        assert kinds == [JournalPart] * (len(kinds) - 1) + [Ready]
        assert (second.ready[0].next_frame, second.ready[0].epoch) == (5, 2)
        journal = second.journal
        assert (journal.next_frame, journal.heard_frames) == (5, 5)
        assert bench.replica.report() == [SlotReport("a", 2, "t", 0, "ingress-2", 2, True, False)]
        bench.replica.offer(frame_in("a", 4, 2))  # asked again: nobody heard it
        await bench.talk("a", range(5, 8), epoch=2)
        assert heard(first) + heard(second) == alone("a", 8)
        with pytest.raises(StaleEpoch):
            bench.replica.offer(frame_in("a", 8, 1))
        assert first.failed == [], "its trunk is gone"
        await bench.replica.close("a", 1, "the former ingress, late")
        assert bench.replica.busy == 1


async def test_an_ingress_that_parked_it_is_told_when_another_resumes_it() -> None:
    async with Bench() as bench:
        first = await resumable(bench)
        await bench.talk("a", range(2))
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        assert [(failed.code, failed.epoch) for failed in first.failed] == [("stale_epoch", 1)]
        await bench.talk("a", range(2, 4), epoch=2)
        assert heard(first) + heard(second) == alone("a", 4)


async def test_a_former_owner_that_cannot_be_told_does_not_keep_it() -> None:
    class Torn(Sink):
        def __call__(self, message: object) -> None:
            if isinstance(message, Failed):
                raise BrokenPipeError
            self.append(message)  # type: ignore[arg-type]  # whatever it is told

    async with Bench() as bench:
        await bench.replica.open(replace(request("a"), resumable=True), Torn())
        await settle()
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        await bench.talk("a", range(2), epoch=2)
        assert heard(second) == alone("a", 2)


async def test_a_trunk_that_comes_back_takes_up_where_it_was() -> None:
    """The same ingress, the same epoch: no state moves, and what was lost with the trunk is answered again."""
    async with Bench() as bench:
        first = await resumable(bench)
        await bench.talk("a", range(2))
        for frame in (2, 3):
            bench.replica.offer(frame_in("a", frame))
        bench.replica.leave("a", 1, first)
        await settle()
        second = Sink()
        await bench.replica.open(replace(request("a"), resumable=True), second)
        assert [type(message) for message in second] == [Ready]
        assert second.ready[0].next_frame == 4
        for frame in range(2, 6):
            bench.replica.offer(frame_in("a", frame))
        await settle()
        assert heard(first) + heard(second) == alone("a", 6)
        bench.replica.leave("a", 1, first)  # the old trunk's end is noticed late
        assert not bench.replica.report()[0].orphan


async def test_there_is_nothing_to_resume_once_the_grace_is_over() -> None:
    async with Bench(settings=ReplicaSettings(window_s=0.0, resume_grace_s=30.0)) as bench:
        sink = await resumable(bench)
        bench.replica.leave("a", 1, sink)
        await bench.clock.advance(29.9)
        assert bench.replica.busy == 1
        await bench.clock.advance(0.3)
        assert bench.replica.busy == 0
        with pytest.raises(UnknownSession):
            await bench.replica.open(resuming("a", 2), Sink())
        fresh = await bench.open("a", epoch=3)
        await settle()
        assert fresh.ready[0].next_frame == 0


async def test_a_drained_replica_waits_five_seconds_for_lost_clients_and_longer_only_beside_others() -> None:
    async with Bench() as bench:
        sink = await resumable(bench)
        beside = await bench.open("b")
        await settle()
        bench.replica.leave("a", 1, sink)
        await bench.clock.advance(1.0)
        bench.replica.drain()
        await bench.clock.advance(9.0)
        assert bench.replica.busy == 2, "as long as the other one is here, the lost client may come back"
        assert any(isinstance(message, Move) for message in beside)
        await bench.replica.close("b", 1, "moved")
        await bench.clock.advance(0.3)
        assert bench.replica.drained

    async with Bench() as bench:
        bench.replica.leave("a", 1, await resumable(bench))
        bench.replica.drain()
        await bench.clock.advance(4.7)
        assert bench.replica.busy == 1
        late = Sink()
        await bench.replica.open(resuming("a", 2), late)
        await bench.talk("a", range(2), epoch=2)
        assert heard(late) == alone("a", 2), "who comes back in time goes on, and is asked to leave"
        await bench.clock.advance(1.3)
        assert any(isinstance(message, Move) for message in late)
        bench.replica.leave("a", 2, late)
        await bench.clock.advance(4.7)
        assert bench.replica.busy == 1, "counted from when it was lost"
        await bench.clock.advance(0.6)
        assert bench.replica.drained


async def test_a_resume_that_comes_just_in_time_wins_and_one_just_too_late_loses() -> None:
    """In one turn of the loop, either way round, with the closing stages slow."""
    for resumed_first in (True, False):
        async with Bench(slots=1, settings=ReplicaSettings(window_s=0.0, resume_grace_s=1.0)) as bench:
            bench.replica.leave("a", 1, await resumable(bench))
            pause = bench.decoder.pause("close")
            bench.clock.time = 1.0
            second = Sink()
            if resumed_first:
                await bench.replica.open(resuming("a", 2), second)
                bench.replica._tenure.tick()
                await bench.talk("a", range(2), epoch=2)
                assert heard(second) == alone("a", 2)
            else:
                bench.replica._tenure.tick()
                opening = asyncio.create_task(bench.replica.open(resuming("a", 2), second))
                await settle()
                assert not opening.done(), "its slot is not free yet, and nobody knows what comes"
                pause.go.set()
                with pytest.raises(UnknownSession):
                    await opening


async def test_another_tenant_learns_nothing_of_it() -> None:
    async with Bench() as bench:
        await resumable(bench)
        with pytest.raises(UnknownSession):
            await bench.replica.open(replace(resuming("a", 2), tenant="other"), Sink())
        with pytest.raises(StaleEpoch):
            await bench.replica.open(resuming("a", 0), Sink())
        assert bench.replica.report()[0].epoch == 1


async def test_resumed_before_its_prompt_was_in() -> None:
    async with Bench(prompt_steps=5) as bench:
        pause = bench.converse.pause("step")
        first = Sink()
        await bench.replica.open(replace(request("a"), resumable=True), first)
        await asyncio.wait_for(pause.reached.wait(), 5)
        bench.replica.leave("a", 1, first)
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        assert list(second) == []
        pause.go.set()
        await settle()
        assert second.journal.next_frame == 0
        await bench.talk("a", range(2), epoch=2)
        assert (list(first), heard(second)) == ([], alone("a", 2))


@pytest.mark.parametrize("stage", STAGES)
async def test_an_ingress_may_die_while_what_can_be_resumed_opens(stage: str) -> None:
    """The opener is cancelled as its link ends; the conversation goes on opening, and waits."""
    async with Bench() as bench:
        pause, first = bench.handles[stage].pause("open"), Sink()
        opening = asyncio.create_task(bench.replica.open(replace(request("a"), resumable=True), first))
        await asyncio.wait_for(pause.reached.wait(), 5)
        bench.replica.leave("a", 1, first)
        opening.cancel()
        await settle()
        pause.go.set()
        await settle()
        second = Sink()
        await bench.replica.open(resuming("a", 2), second)
        await settle()
        await bench.talk("a", range(2), epoch=2)
        assert (list(first), heard(second)) == ([], alone("a", 2))


async def test_what_was_resumed_here_can_be_opened_here_only_at_a_later_epoch() -> None:
    """The stages know it by the epoch it came under; closing it ends all that it has had since."""
    async with Bench() as bench:
        await resumable(bench)
        await bench.replica.open(resuming("a", 4), Sink())
        await bench.replica.close("a", 4, "done")
        for epoch in (1, 2, 4):
            with pytest.raises(StaleEpoch):
                await bench.open("a", epoch=epoch)
        await bench.open("a", epoch=5)


async def test_an_orphan_needs_the_router_and_a_call_with_a_trunk_does_not() -> None:
    async with Bench() as bench:
        orphan, kept = await resumable(bench), await resumable(bench, "b")
        bench.replica.renewed(bench.clock.now(), lease_s=3.0)
        bench.replica.leave("a", 1, orphan)
        await bench.clock.advance(2.9)
        assert bench.replica.busy == 2
        bench.replica.renewed(bench.clock.now(), lease_s=3.0)
        await bench.clock.advance(ROUTER_AWAY_S + 2.9)  # it may have died with Ray's head
        assert bench.replica.busy == 2
        await bench.clock.advance(0.3)
        assert [slot.session for slot in bench.replica.report()] == ["b"]
        await bench.talk("b", range(2))
        assert heard(kept) == alone("b", 2)


async def test_a_lease_that_was_given_to_somebody_else_ends_it() -> None:
    async with Bench() as bench:
        sink = await bench.open("a", epoch=3)
        await settle()
        bench.replica.revoke("a", 2, "an older one")
        assert bench.replica.busy == 1
        bench.replica.revoke("a", 3, "The lease of the conversation has ended.")
        assert [failed.code for failed in sink.failed] == ["stale_epoch"]
        await settle()
        assert bench.replica.busy == 0


# ---- asked to leave ----


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
        await asyncio.wait_for(pause.reached.wait(), 5)
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


# ---- brought back to life ----


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
        await asyncio.wait_for(pause.reached.wait(), 5)
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

"""A conversation that waits where it was, for its client or its ingress: it is resumed, or its time runs out."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from actors.errors import StaleEpoch, UnknownSession
from actors.interfaces import ReplicaSettings
from actors.messages import Failed, JournalPart, Move, Ready, SlotReport
from actors.tenure import ROUTER_AWAY_S
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers, request
from tests.fake_clock import settle
from tests.unit.actors.handovers import resumable, resuming

STAGES = ["encoder", "converse", "decoder"]


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
        await asyncio.wait_for(pause.reached.wait(), 30)
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
        await asyncio.wait_for(pause.reached.wait(), 30)
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

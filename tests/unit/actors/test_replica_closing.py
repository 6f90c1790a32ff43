"""Every await as the place where the other side goes away: closing, cancelling, and random histories of both."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import NoCapacity, UnknownSession
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers
from tests.fake_clock import settle

STAGES = ["encoder", "converse", "decoder"]
WHEN = ["before", "after"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("stage", STAGES)
async def test_closing_with_a_frame_in_flight(stage: str, when: str) -> None:
    """The frame goes nowhere, the slot comes back, and neither its next owner nor the neighbour notices."""
    async with Bench(slots=2) as bench:
        victim, neighbour = await bench.open("a"), await bench.open("b")
        await settle()
        pause = bench.handles[stage].pause("step", when)
        for session in "ab":
            bench.replica.offer(frame_in(session, 0))
            bench.replica.offer(frame_in(session, 1))
        await asyncio.wait_for(pause.reached.wait(), 30)
        closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await settle()
        assert not [report for report in bench.replica.report() if report.session == "a"], "gone at once"
        pause.go.set()
        await closing
        assert victim == [*victim.ready]
        assert bench.replica.busy == 1
        heir = await bench.open("c")
        await settle()
        assert heir.ready[0].slot == 0, "the freed slot"
        await bench.talk("c", range(3))
        await bench.talk("b", range(2, 4))
        assert heard(heir) == alone("c", 3)
        assert heard(neighbour) == alone("b", 4)
        assert bench.replica.healthy


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("stage", STAGES)
async def test_a_slot_is_not_given_out_before_all_three_stages_have_let_go(stage: str, when: str) -> None:
    async with Bench(slots=1) as bench:
        await bench.open("a")
        await settle()
        pause = bench.handles[stage].pause("close", when)
        closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        await settle()
        assert bench.replica.busy == 1
        with pytest.raises(NoCapacity):
            await bench.open("b")
        pause.go.set()
        await closing
        await bench.open("b")


@pytest.mark.parametrize("end", ["close", "cancel"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("stage", STAGES)
async def test_leaving_while_the_stages_open(stage: str, when: str, end: str) -> None:
    async with Bench(slots=1) as bench:
        pause = bench.handles[stage].pause("open", when)
        opening = asyncio.create_task(bench.open("a"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        await settle()
        if end == "cancel":
            opening.cancel()
            closing = None
        else:
            closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await settle()
        assert bench.replica.report() == []
        assert bench.replica.busy == 1, "its slot is not safe yet"
        pause.go.set()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else UnknownSession):
            await opening
        if closing is not None:
            await closing
        await settle()
        assert (bench.replica.busy, bench.engine.open_slots) == (0, set())
        sink = await bench.open("b")
        await settle()
        await bench.talk("b", range(2))
        assert heard(sink) == alone("b", 2)


async def test_leaving_during_the_prompt() -> None:
    async with Bench(slots=1, prompt_steps=10**6) as bench:
        sink = await bench.open("a")
        bench.replica.offer(frame_in("a", 0))
        await bench.replica.close("a", 1, "gone")
        steps = bench.engine.steps
        await settle()
        assert (bench.engine.steps, bench.replica.busy, list(sink)) == (steps, 0, [])


@pytest.mark.parametrize("when", WHEN)
async def test_a_close_that_is_cancelled_still_frees_the_slot(when: str) -> None:
    async with Bench(slots=1) as bench:
        await bench.open("a")
        pause = bench.decoder.pause("close", when)
        closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        closing.cancel()
        await settle()
        pause.go.set()
        await settle()
        assert bench.replica.busy == 0


async def test_closing_twice_and_closing_what_is_not_there() -> None:
    async with Bench() as bench:
        await bench.open("a", epoch=2)
        await bench.replica.close("b", 1, "never was")
        await bench.replica.close("a", 1, "an old epoch")
        assert bench.replica.busy == 1
        await asyncio.gather(*(bench.replica.close("a", 2, "gone") for _ in range(3)))
        await bench.replica.close("a", 2, "again")
        assert bench.replica.busy == 0


async def test_coming_back_at_once_waits_for_the_former_call_to_be_gone() -> None:
    async with Bench(slots=1) as bench:
        await bench.open("a", epoch=1)
        await settle()
        pause = bench.encoder.pause("close")
        closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await asyncio.wait_for(pause.reached.wait(), 30)
        opening = asyncio.create_task(bench.open("a", epoch=2))
        await settle()
        assert not opening.done()
        pause.go.set()
        await closing
        sink = await opening
        await settle()
        await bench.talk("a", range(2), epoch=2)
        assert heard(sink) == alone("a", 2)


async def test_the_loop_may_be_cancelled_at_any_stage() -> None:
    for stage in STAGES:
        bench = Bench()
        async with bench:
            await bench.open("a")
            await settle()
            bench.handles[stage].pause("step")
            bench.replica.offer(frame_in("a", 0))
            await settle()
            assert bench._run is not None
            bench._run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bench._run
            bench._run = asyncio.create_task(bench.replica.run())  # so that the bench has one to wait for


class Talker:
    """One conversation after another from one place, at the mercy of a random number generator."""

    def __init__(self, bench: Bench, name: str, rng: random.Random) -> None:
        self.bench, self.name, self.rng = bench, name, rng
        self.epoch = 0
        self.said: list[tuple[Sink, int]] = []

    async def live(self, calls: int) -> None:
        for _ in range(calls):
            self.epoch += 1
            opening = asyncio.create_task(self.bench.open(self.name, epoch=self.epoch))
            if self.rng.random() < 0.2:
                await settle(self.rng.randrange(12))
                opening.cancel()
            try:
                sink = await opening
            except (NoCapacity, asyncio.CancelledError):
                continue
            frames = self.rng.randrange(6)
            for frame in range(frames):
                await settle(self.rng.randrange(30))
                for _ in range(1 + (self.rng.random() < 0.2)):  # now and then a retry
                    self.bench.replica.offer(frame_in(self.name, frame, self.epoch))
            if self.rng.random() < 0.5:
                while len({*numbers(sink)}) < frames:
                    await settle(5)
            self.said.append((sink, frames))
            if self.rng.random() < 0.8:  # else the next epoch takes over from a call that goes on
                await self.bench.replica.close(self.name, self.epoch, "bye")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_lives_never_disturb_each_other(seed: int) -> None:
    """Five talkers on three slots, stages that take a random number of turns, closes and cancels anywhere: whatever
    a conversation hears is the beginning of what it would have heard alone, and all slots are free at the end."""
    rng = random.Random(seed)

    async def scenario() -> None:
        async with Bench(slots=3, prompt_steps=2, turns=lambda: rng.randrange(4)) as bench:
            talkers = [Talker(bench, name, rng) for name in "abcde"]
            await asyncio.gather(*(talker.live(4) for talker in talkers))
            assert bench.replica.healthy, bench.replica.fault
            for talker in talkers:
                for sink, frames in talker.said:
                    once = {out.key.frame: spoken for out, spoken in zip(sink.frames, heard(sink), strict=True)}
                    assert list(once) == list(range(len(once)))
                    assert [*once.values()] == alone(talker.name, frames)[: len(once)]
                    assert not {failed.code for failed in sink.failed} - {"stale_epoch"}
        for stage in (bench.encoder.stage, bench.converse.stage, bench.decoder.stage):
            assert [stage._gate.owner(slot) for slot in range(3)] == [None] * 3

    asyncio.run(scenario())

"""A replica that reads others' pasts: what it is at is hurried as soon as a frame waits for it."""

from __future__ import annotations

import asyncio

import pytest

from actors.interfaces import ReplicaSettings
from tests.actor_fakes import Bench, alone, frame_in, heard
from tests.fake_clock import settle
from tests.unit.actors.handovers import held, rebuilt

PIECES = ReplicaSettings(window_s=0.0, rebuild_live_s=0.0)  # a frame of the past at a time


@pytest.mark.parametrize(("stage", "method"), [("encoder", "rebuild"), ("converse", "step"), ("decoder", "rebuild")])
async def test_a_stage_that_is_at_anothers_past_is_told_of_a_frame(stage: str, method: str) -> None:
    journal, _ = await held(5)
    async with Bench(settings=PIECES) as bench:
        neighbour = await bench.open("b")
        await settle()
        handle = bench.handles[stage]
        at_it = handle.pause(method)
        opening = asyncio.create_task(rebuilt(bench, journal))
        await at_it.reached.wait()
        await settle()
        before = handle.hurried
        bench.replica.offer(frame_in("b", 0))
        await settle()
        assert handle.hurried == before + 1
        assert not neighbour.frames, "it waits, for as long as the piece takes"
        at_it.go.set()
        await settle()
        assert heard(neighbour) == alone("b", 1)
        await opening


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
async def test_while_frames_wait_a_past_gets_one_piece_a_frames_time(stage: str) -> None:
    journal, _ = await held(40)
    async with Bench(settings=PIECES) as bench:
        neighbour = await bench.open("b")
        await settle()
        handle = bench.handles[stage]
        first = handle.pause("rebuild", "after")
        opening = asyncio.create_task(rebuilt(bench, journal))
        await first.reached.wait()
        assert handle.behind is True, "nobody waited for it"
        for frame in range(20):
            bench.replica.offer(frame_in("b", frame))
        await settle()
        handle.calls.clear()
        await bench.clock.advance(0.1)
        await settle()
        last = handle.pause("step")
        first.go.set()
        await last.reached.wait()
        assert handle.calls == []
        last.go.set()
        again = handle.pause("rebuild")
        await again.reached.wait()
        steps = handle.calls.count("step")
        assert (steps, handle.behind) == (1, False), "it is late, so it gets its piece, and goes first: frames wait"
        handle.calls.clear()
        again.go.set()
        while len(neighbour.frames) < 20:
            await settle(1)
        assert handle.calls[:19] == ["rebuild"] + ["step"] * 18, "and no other before its time"
        await opening
        await settle(1000)
        assert heard(neighbour) == alone("b", 20)

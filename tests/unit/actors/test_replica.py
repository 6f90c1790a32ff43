"""Replica: frames in and out, batching, bounds, retries, prompts, faults; on fakes and a clock that stands still."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from actors.errors import (
    BadRequest,
    StaleEpoch,
    UnknownSession,
)
from actors.interfaces import ReplicaSettings
from actors.messages import FrameIn, SlotReport
from graphs.stages import FrameKey
from tests.actor_fakes import Bench, Sink, alone, frame_in, heard, numbers, request
from tests.fake_clock import settle

FRAMES = 6


async def test_a_conversation_from_open_to_close() -> None:
    async with Bench(prompt_steps=3) as bench:
        sink = await bench.open("a")
        await settle()
        (ready,) = sink.ready
        assert (ready.session, ready.epoch, ready.slot, ready.prompt_frames) == ("a", 1, 0, 30)
        assert (ready.prompt_hash, ready.numerics_id) == ("hash-of-voice", "fake")
        await bench.talk("a", range(FRAMES))
        assert numbers(sink) == list(range(FRAMES))
        assert heard(sink) == alone("a", FRAMES)
        assert [out.text for out in sink.frames] == [
            "" if out.text_token in (0, 3) else f" w{out.text_token}" for out in sink.frames
        ]
        assert bench.replica.report() == [SlotReport("a", 1, "t", 0, "ingress-1")]
        await bench.replica.close("a", 1, "hung up")
        assert (bench.replica.busy, bench.replica.report(), sink.failed) == (0, [], [])


async def test_neighbours_do_not_change_a_conversation() -> None:
    async with Bench() as bench:
        sinks = {session: await bench.open(session) for session in "abcd"}
        await settle()
        for frame in range(FRAMES):
            for session in sinks:
                bench.replica.offer(frame_in(session, frame))
            await settle()
        for session, sink in sinks.items():
            assert heard(sink) == alone(session, FRAMES)
        assert set(bench.metrics.batches["encoder"]) == {4}, "one call for all who spoke"


async def test_the_journal_grows_with_the_frames_and_goes_out_with_them() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        await bench.talk("a", range(FRAMES))
        journal = bench.replica.journal("a", 1)
        assert (journal.prompt_hash, journal.numerics_id, journal.next_frame) == ("hash-of-voice", "fake", FRAMES)
        np.testing.assert_array_equal(journal.rows.array(), [out.journal_row for out in sink.frames])
        np.testing.assert_array_equal(journal.user_codes.array(), [out.user_codes for out in sink.frames])
        np.testing.assert_array_equal(journal.agent_codes.array(), [out.codes for out in sink.frames])
        np.testing.assert_array_equal(journal.rows.array()[:, 9:], journal.user_codes.array())
        np.testing.assert_array_equal(journal.pcm.array(), [frame_in("a", f).pcm for f in range(FRAMES)])
        with pytest.raises(UnknownSession):
            bench.replica.journal("a", 2)


async def test_stages_work_side_by_side() -> None:
    """While the engine is at frame 0, the encoder does frame 1; no stage sees two frames of a call at a time."""
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        pause = bench.converse.pause("step")
        bench.replica.offer(frame_in("a", 0))
        bench.replica.offer(frame_in("a", 1))
        await settle()
        assert pause.reached.is_set()
        assert bench.encoder.calls.count("step") == 2
        pause.go.set()
        await settle()
        assert heard(sink) == alone("a", 2)
        assert all(len(batch.keys) <= 1 for batch in bench.encoder.batches)


# ---- prompts ----


async def test_prompts_are_prefilled_while_nobody_speaks_and_no_longer() -> None:
    async with Bench(prompt_steps=7) as bench:
        await bench.open("a")
        await settle()
        assert bench.engine.steps == 7
        await settle()
        assert bench.engine.steps == 7


async def test_a_prompt_does_not_hold_up_those_who_speak() -> None:
    async with Bench(prompt_steps=1) as bench:
        talking = await bench.open("a")
        await settle()
        bench.engine.prompt_steps = 10**6
        waiting = await bench.open("b")
        await bench.talk("a", range(FRAMES))
        assert heard(talking) == alone("a", FRAMES)
        assert waiting.ready == []


async def test_ready_may_overtake_the_answer_to_open() -> None:
    """The engine's step reply can be back before the reply to the open that it followed."""
    async with Bench(prompt_steps=1) as bench:
        await bench.open("b")
        await settle()
        bench.engine.prompt_steps = 2
        await bench.open("c")  # keeps the engine stepping
        pause = bench.converse.pause("open", "after")
        bench.engine.prompt_steps = 1
        opening = asyncio.create_task(bench.open("a"))
        await settle()
        pause.go.set()
        sink = await opening
        await settle()
        assert [ready.session for ready in sink.ready] == ["a"]


async def test_ready_of_a_call_that_has_ended_is_not_said() -> None:
    async with Bench(slots=1, prompt_steps=1) as bench:
        pause = bench.converse.pause("open", "after")
        sink = Sink()
        opening = asyncio.create_task(bench.replica.open(request("a"), sink))
        await settle()
        bench.replica._calls.prompts(ready=[("a", 1)], failed=())
        closing = asyncio.create_task(bench.replica.close("a", 1, "gone"))
        await settle()
        pause.go.set()
        with pytest.raises(UnknownSession):
            await opening
        await closing
        assert sink == []


async def test_early_frames_wait_for_the_prompt_up_to_a_bound() -> None:
    async with Bench(prompt_steps=10**6) as bench:
        sink = await bench.open("a")
        for frame in range(7):
            bench.replica.offer(frame_in("a", frame))
        assert [(need.key.frame, need.need_frame) for need in sink.needs] == [(5, 5), (6, 5)]
        bench.clock.time += 3.0
        bench.engine.left[0] = 1
        await settle()
        assert numbers(sink) == [0, 1, 2, 3, 4]
        assert heard(sink) == alone("a", 5)
        assert not bench.metrics.misses, "the wait for the prompt is no frame's fault"
        assert sink.ready[0].ready_ms == 3000.0


async def test_a_prompt_that_fails_ends_its_own_call() -> None:
    async with Bench() as bench:
        sink, other = await bench.open("a"), await bench.open("b")
        bench.replica._calls.prompts(ready=(), failed=(("a", 1, "The voice is damaged."), ("b", 9, "another epoch's")))
        await settle()
        assert [(failed.code, failed.message) for failed in sink.failed] == [("bad_request", "The voice is damaged.")]
        assert (len(other.ready), bench.replica.busy) == (1, 1)


# ---- batching window and deadline ----


async def test_the_window_waits_for_those_who_are_due_and_for_nobody_else() -> None:
    async with Bench(settings=ReplicaSettings(window_s=0.015)) as bench:
        for session in "abc":
            await bench.open(session)
        await settle()

        async def speak(frame: int, *sessions: str) -> None:
            for session in sessions:
                bench.replica.offer(frame_in(session, frame))
                await settle()

        await speak(0, "a", "b", "c")
        batches = bench.metrics.batches["encoder"]
        assert batches == [1, 1, 1], "nobody has spoken yet, so nobody is due"
        await bench.clock.advance(0.078)
        await speak(1, "a")
        assert len(batches) == 3, "b and c are due: a waits for them"
        await bench.clock.advance(0.005)
        await speak(1, "b", "c")
        assert batches[3:] == [3], "all are there: no more waiting"
        await bench.clock.advance(0.080)
        await speak(2, "a")
        await bench.clock.advance(0.016)
        assert batches[4:] == [1], "the window ends"
        await speak(2, "b")
        await bench.clock.advance(0.016)
        assert batches[5:] == [1]
        await bench.clock.advance(0.060)
        await speak(3, "a")
        await bench.clock.advance(0.2)
        await speak(3, "b")
        assert batches[6:] == [1, 1], "c has fallen silent: nobody waits for it"


async def test_the_call_that_a_window_began_with_may_close() -> None:
    async with Bench(settings=ReplicaSettings(window_s=0.015)) as bench:
        for session in "ab":
            await bench.open(session)
        await settle()
        bench.replica.offer(frame_in("b", 0))
        await settle()
        await bench.clock.advance(0.070)
        bench.replica.offer(frame_in("a", 0))
        await settle()
        await bench.replica.close("a", 1, "gone")
        await bench.clock.advance(0.020)
        assert bench.metrics.batches["encoder"] == [1], "no call of the stage for nobody"


async def test_a_frame_that_takes_longer_than_80_ms_is_counted_against_its_slot() -> None:
    async with Bench() as bench:
        await bench.open("b")
        sink = await bench.open("a")
        await settle()
        await bench.talk("a", range(1))
        pause = bench.decoder.pause("step")
        bench.replica.offer(frame_in("a", 1))
        await settle()
        await bench.clock.advance(0.081)
        pause.go.set()
        await settle()
        assert [round(out.replica_ms, 3) for out in sink.frames] == [0.0, 81.0]
        assert bench.metrics.frame_ms == [out.replica_ms for out in sink.frames]
        assert dict(bench.metrics.misses) == {1: 1}


# ---- retries, order, bounds ----


async def test_a_frame_offered_again_is_answered_again_and_computed_once() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        await bench.talk("a", range(3))
        before = list(sink.frames)
        for frame in range(3):
            bench.replica.offer(frame_in("a", frame))
        await settle()
        assert [out.key.frame for out in sink.frames] == [0, 1, 2, 0, 1, 2]
        assert sink.frames[3:] == before
        await bench.talk("a", range(3, 5))
        assert heard(sink)[6:] == alone("a", 5)[3:]


async def test_a_frame_offered_again_while_it_is_under_way_is_answered_once() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        pause = bench.encoder.pause("step")
        bench.replica.offer(frame_in("a", 0))
        await settle()
        bench.replica.offer(frame_in("a", 0))
        pause.go.set()
        await settle()
        assert numbers(sink) == [0]


async def test_a_frame_too_early_gets_the_one_that_is_due() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        bench.replica.offer(frame_in("a", 2))
        assert [(need.key.frame, need.need_frame) for need in sink.needs] == [(2, 0)]


async def test_frames_in_flight_have_a_bound_and_room_comes_back() -> None:
    async with Bench(settings=ReplicaSettings(window_s=0.0, frames_in_flight=3)) as bench:
        sink = await bench.open("a")
        await settle()
        pause = bench.encoder.pause("step")
        for frame in range(5):
            bench.replica.offer(frame_in("a", frame))
        assert [need.need_frame for need in sink.needs] == [3, 3]
        await settle()
        pause.go.set()
        await settle()
        await bench.talk("a", range(3, 5))
        assert heard(sink) == alone("a", 5)


async def test_frames_of_strangers_are_refused() -> None:
    async with Bench() as bench:
        await bench.open("a", epoch=3)
        with pytest.raises(UnknownSession):
            bench.replica.offer(frame_in("b", 0))
        with pytest.raises(StaleEpoch, match="at epoch 3, not 2"):
            bench.replica.offer(frame_in("a", 0, epoch=2))
        with pytest.raises(UnknownSession):
            bench.replica.offer(frame_in("a", 0, epoch=4))
        with pytest.raises(BadRequest, match="1920 samples"):
            bench.replica.offer(FrameIn(FrameKey("a", 3, 0), np.zeros(960, dtype=np.int16)))


async def test_the_sender_may_use_its_buffer_again() -> None:
    async with Bench() as bench:
        sink = await bench.open("a")
        await settle()
        frame = frame_in("a", 0)
        bench.replica.offer(frame)
        frame.pcm[:] = -1
        await settle()
        assert heard(sink) == alone("a", 1)

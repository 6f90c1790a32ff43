"""A conversation as a protocol handler sees it: order, pace, bounds, failures, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from actors.errors import (
    BadRequest,
    ConversationBroken,
    EngineLost,
    IdleClient,
    NoCapacity,
    ReplicaLost,
    RoleTooLong,
    SlowClient,
    UnknownVoice,
)
from actors.messages import FrameIn, Need
from graphs.stages import FrameKey, SessionSpec
from serving.conversation import Conversation
from serving.home import MAX_IN_FLIGHT
from tests.fake_clock import settle
from tests.session_fakes import PCM, SPEC, TENANT, Stage


@asynccontextmanager
async def talking(stage: Stage) -> AsyncIterator[Conversation]:
    """A conversation whose prompt is in."""
    async with stage.hub.open(SPEC, TENANT, "test") as conversation:
        stage.ready()
        await conversation.ready()
        yield conversation
    await stage.assert_nothing_is_left()


async def send_all(conversation: Conversation, frames: int) -> None:
    for _ in range(frames):
        await conversation.send(PCM)


async def test_a_conversation_from_open_to_close() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        request = stage.trunk.opened
        assert (request.tenant, request.ingress, request.spec) == ("acme", "ingress-1", SPEC)
        assert stage.router.requests[0].tenant_limit == 3
        await send_all(conversation, 3)
        assert stage.trunk.frames == [0, 1, 2]
        for frame in range(3):
            stage.answer(frame, text="hi" if frame == 1 else "")
        frames = conversation.frames()
        heard = [await anext(frames) for _ in range(3)]
        assert [(frame.key.frame, frame.text) for frame in heard] == [(0, ""), (1, "hi"), (2, "")]
        assert conversation.journal.heard_frames == conversation.journal.next_frame == 3
        assert conversation.journal.prompt_hash == "hash"
        await frames.aclose()
    assert stage.router.released == [(request.session, 1, True)]


async def test_each_conversation_has_a_session_of_its_own() -> None:
    stage = Stage()
    async with stage.hub.open(SPEC, TENANT, "a") as one, stage.hub.open(SPEC, TENANT, "b") as other:
        assert one.session != other.session
    await stage.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (SessionSpec("../voice", "", 0), UnknownVoice),
        (SessionSpec("voice", "x" * 100_000, 0), RoleTooLong),
        (SessionSpec("voice", "\ud800", 0), BadRequest),
    ],
)
async def test_what_cannot_be_served_is_refused_before_a_slot_is_taken(
    spec: SessionSpec, error: type[Exception]
) -> None:
    stage = Stage()
    with pytest.raises(error):
        async with stage.hub.open(spec, TENANT, "test"):
            pass
    assert stage.router.requests == []


async def test_no_capacity_is_raised_by_open() -> None:
    stage = Stage(slots=0)
    with pytest.raises(NoCapacity):
        async with stage.hub.open(SPEC, TENANT, "test"):
            pass
    await stage.assert_nothing_is_left(slots=0)


async def test_a_replica_out_of_reach_gives_the_slot_back_unopened_and_another_is_tried() -> None:
    stage = Stage()
    stage.router.replicas = ["r1", "r2"]
    stage.trunks.dead = {"ws://r1"}
    async with stage.hub.open(SPEC, TENANT, "test") as conversation:
        assert conversation.epoch == 2  # the first grant's is over, whatever its replica comes to think
        assert [(epoch, opened) for _, epoch, opened in stage.router.released] == [(1, False)]
    await stage.assert_nothing_is_left()


async def test_when_no_replica_can_be_reached_there_is_no_capacity() -> None:
    stage = Stage()
    stage.trunk.lost = True
    with pytest.raises(NoCapacity):
        async with stage.hub.open(SPEC, TENANT, "test"):
            pass
    await stage.assert_nothing_is_left()
    stage.router.replicas = ["r1", "r2", "r3", "r4"]
    with pytest.raises(ReplicaLost):  # not for ever
        async with stage.hub.open(SPEC, TENANT, "test"):
            pass
    await stage.assert_nothing_is_left()
    assert [opened for _, _, opened in stage.router.released] == [False] * 4


async def test_what_the_replica_says_against_it_is_raised_by_ready() -> None:
    stage = Stage()
    async with stage.hub.open(SPEC, TENANT, "test") as conversation:
        stage.fail("role_too_long")
        with pytest.raises(RoleTooLong):
            await conversation.ready()
        with pytest.raises(RoleTooLong):
            await conversation.send(PCM)
    await stage.assert_nothing_is_left()


async def test_a_prompt_that_never_comes_ends_the_conversation() -> None:
    stage = Stage(ready_timeout_s=10.0, idle_timeout_s=99.0)
    async with stage.hub.open(SPEC, TENANT, "test") as conversation:
        waiting = asyncio.create_task(conversation.ready())
        await settle()
        await stage.clock.advance(10.0)
        with pytest.raises(ConversationBroken, match="10 s"):
            await waiting
    await stage.assert_nothing_is_left()


async def test_five_frames_ahead_then_real_time() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        sending = asyncio.create_task(send_all(conversation, 8))
        await settle()
        assert len(stage.trunk.frames) == 5
        for sent in (6, 7, 8):
            await stage.clock.advance(0.0801)
            assert len(stage.trunk.frames) == sent
        await sending


async def test_who_paused_may_catch_up_by_what_may_be_in_flight() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        await stage.clock.advance(60.0)
        sending = asyncio.create_task(send_all(conversation, 100))
        await settle()
        assert len(stage.trunk.frames) == MAX_IN_FLIGHT
        sending.cancel()


async def test_in_real_time_nobody_waits() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        for frame in range(100):
            await asyncio.wait_for(conversation.send(PCM), 30)
            stage.answer(frame)
            await stage.clock.advance(0.08)


async def test_a_replica_that_lags_holds_the_sender_back() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        await stage.clock.advance(50.0)
        await send_all(conversation, MAX_IN_FLIGHT)
        await stage.clock.advance(50.0)
        sending = asyncio.create_task(conversation.send(PCM))
        await settle()
        assert not sending.done()
        stage.answer(0)
        await sending
        assert stage.trunk.frames[-1] == MAX_IN_FLIGHT


async def test_a_slow_reader_loses_oldest_audio_and_then_the_conversation() -> None:
    stage = Stage(idle_timeout_s=999.0)
    async with talking(stage) as conversation:
        watching = asyncio.create_task(conversation.watch())
        for frame in range(125):  # 10 s, nobody reads
            await conversation.send(PCM)
            stage.answer(frame, text="w" if frame == 3 else "")
            await stage.clock.advance(0.08)
        assert not watching.done()
        frames = conversation.frames()
        first, second = await anext(frames), await anext(frames)
        assert (first.key.frame, first.text, len(first.pcm)) == (3, "w", 0)
        assert (second.key.frame, len(second.pcm)) == (100, 1920)
        for frame in range(125, 227):
            await conversation.send(PCM)
            stage.answer(frame)
            await stage.clock.advance(0.08)
        with pytest.raises(SlowClient):
            await watching  # although the reader is stuck
        with pytest.raises(SlowClient):
            await anext(frames)


async def test_silence_from_the_client_ends_in_idle() -> None:
    stage = Stage(idle_timeout_s=30.0)
    async with talking(stage) as conversation:
        watching = asyncio.create_task(conversation.watch())
        await stage.clock.advance(29.0)
        await conversation.send(PCM)
        await stage.clock.advance(29.0)
        assert not watching.done()
        await stage.clock.advance(1.5)
        with pytest.raises(IdleClient, match="30 s"):
            await watching


async def test_a_failure_gives_what_had_come_and_then_raises() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        await conversation.send(PCM)
        stage.answer(0)
        conversation.fail(EngineLost("There is no other replica."))
        frames = conversation.frames()
        assert (await anext(frames)).key.frame == 0
        with pytest.raises(EngineLost):
            await anext(frames)
        with pytest.raises(EngineLost):
            await conversation.send(PCM)


async def test_frames_end_when_the_handler_ends_the_conversation() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        reader = asyncio.create_task(anext(conversation.frames(), None))
        watcher = asyncio.create_task(conversation.watch())
        await settle()
    assert await reader is None
    await watcher


async def test_a_frame_answered_again_is_heard_once() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        await send_all(conversation, 3)
        stage.answer(0)
        stage.answer(0)
        stage.answer(1)
        frames = conversation.frames()
        assert [(await anext(frames)).key.frame for _ in range(2)] == [0, 1]


async def test_frames_the_replica_misses_are_sent_again_from_the_journal() -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        for frame in range(4):
            await conversation.send(PCM + frame)
        request = stage.trunk.opened
        stage.trunk.down(Need(FrameKey(request.session, 1, 3), 2))
        again = [message for message in stage.trunk.sent if isinstance(message, FrameIn)][4:]
        assert [message.key.frame for message in again] == [2, 3]
        assert np.array_equal(again[0].pcm, PCM + 2)
        stage.trunk.down(Need(FrameKey(request.session, 1, 4), 2))  # said before those were there
        assert stage.trunk.frames == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("pcm", [np.zeros(1919, np.int16), np.zeros((1, 1920), np.int16), np.zeros(1920, np.float32)])
async def test_a_frame_of_another_shape_is_refused_here(pcm: np.ndarray) -> None:
    stage = Stage()
    async with talking(stage) as conversation:
        with pytest.raises(BadRequest):
            await conversation.send(pcm)


# The handler may die at any await: cancel it at every one there is, and look what is left.

AWAITS = ["router.before", "router.after", "trunks.gate", "ready", "pace", "in flight", "frames", "watch"]


@pytest.mark.parametrize("where", AWAITS)
async def test_a_handler_that_dies_leaves_nothing(where: str) -> None:
    stage = Stage()
    gates = {
        "router.before": stage.router.before,
        "router.after": stage.router.after,
        "trunks.gate": stage.trunks.gate,
    }
    if where in gates:
        gates[where].shut()

    async def handler() -> None:
        async with stage.hub.open(SPEC, TENANT, "test") as conversation:
            if where != "ready":
                stage.ready()
            await conversation.ready()
            if where == "frames":
                await anext(conversation.frames())
            elif where == "watch":
                await conversation.watch()
            elif where == "in flight":
                await stage.clock.advance(60.0)
            await send_all(conversation, 99)

    task = asyncio.create_task(handler())
    await settle()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for gate in gates.values():
        gate.open()
    await stage.assert_nothing_is_left()


async def test_a_handler_that_raises_leaves_nothing() -> None:
    stage = Stage()
    with pytest.raises(ZeroDivisionError):
        async with stage.hub.open(SPEC, TENANT, "test"):
            raise ZeroDivisionError
    await stage.assert_nothing_is_left()

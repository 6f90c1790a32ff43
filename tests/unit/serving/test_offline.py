"""A recording through a replica of a few lines: order, the bound on frames under way, and how it ends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from actors.errors import ConversationBroken, NoCapacity
from actors.messages import DownSink, Failed, FrameIn, FrameOut, Need, OpenRequest, Ready
from graphs.stages import SessionSpec
from serving.offline import FRAMES_IN_FLIGHT, answer_frames

SPEC = SessionSpec("NATF2", "", 7)


def frames(count: int) -> npt.NDArray[np.int16]:
    """Frame k is filled with k."""
    return np.repeat(np.arange(count, dtype=np.int16)[:, None], 1920, axis=1)


class EchoReplica:
    """Answers each frame with itself, its number as every token, one frame later than it came."""

    def __init__(self) -> None:
        self.sink: DownSink | None = None
        self.waiting: list[FrameIn] = []
        self.most_waiting = 0
        self.closed: list[str] = []
        self.fail_at: int | None = None
        self.forget_at: int | None = None

    async def open(self, request: OpenRequest, sink: DownSink) -> None:
        assert request.spec == SPEC
        self.sink = sink
        sink(Ready(request.session, request.epoch, 0, 10, "digest", 1.0, "id"))

    def offer(self, frame: FrameIn) -> None:
        assert self.sink is not None
        key = frame.key
        if key.frame == self.fail_at:
            self.sink(Failed(key.session, key.epoch, "conversation_broken", "It broke."))
            return
        if key.frame == self.forget_at:
            self.sink(Need(key, key.frame))
            return
        self.waiting.append(frame)
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        # The replica is busy until as much waits as it is given at most, or until the recording is over.
        while len(self.waiting) >= FRAMES_IN_FLIGHT or (self.waiting and self.waiting[-1].key.frame == 19):
            self.answer(self.waiting.pop(0))

    def answer(self, frame: FrameIn) -> None:
        assert self.sink is not None
        number = frame.key.frame
        eight = np.full(8, number, dtype=np.int16)
        row = np.full(17, number, dtype=np.int16)
        self.sink(FrameOut(frame.key, frame.pcm, number, f" {number}", eight, eight, row, 1.0))

    async def close(self, session: str, epoch: int, reason: str) -> None:
        self.closed.append(session)


async def test_every_frame_is_answered_in_order_and_the_slot_given_back() -> None:
    replica, told = EchoReplica(), list[int]()
    heard = await answer_frames(replica, frames(20), SPEC, told.append)
    assert np.array_equal(heard.pcm, frames(20).reshape(-1))
    assert heard.tokens.tolist() == [[k] * 9 for k in range(20)]
    assert heard.pieces == tuple(f" {k}" for k in range(20))
    assert told == list(range(1, 21))
    assert replica.most_waiting == FRAMES_IN_FLIGHT
    assert len(replica.closed) == 1


async def test_a_replica_that_loses_a_frame_is_not_waited_for() -> None:
    replica = EchoReplica()
    replica.forget_at = 3
    with pytest.raises(ConversationBroken, match="frame 3"):
        await answer_frames(replica, frames(20), SPEC)
    assert len(replica.closed) == 1


async def test_a_conversation_that_breaks_raises_what_the_replica_said() -> None:
    replica = EchoReplica()
    replica.fail_at = 5
    with pytest.raises(ConversationBroken, match="It broke"):
        await answer_frames(replica, frames(20), SPEC)
    assert len(replica.closed) == 1


async def test_a_replica_without_room_is_not_closed_twice() -> None:
    class Full(EchoReplica):
        async def open(self, request: OpenRequest, sink: DownSink) -> None:
            raise NoCapacity("Every slot is taken.")

    replica = Full()
    with pytest.raises(NoCapacity):
        await answer_frames(replica, frames(3), SPEC)
    assert replica.closed == []

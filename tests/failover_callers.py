"""Callers in tests.failover_fakes.World: one that reads all it gets, and the steps of one that a test takes itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from actors.errors import ServingError
from actors.messages import FrameOut
from serving.conversation import Conversation
from tests.failover_fakes import TENANT, World
from tests.fake_replica import SPEC, spoken, undisturbed


class Caller:
    """A client that reads all it gets."""

    def __init__(self, world: World, conversation: Conversation) -> None:
        self.world = world
        self.conversation = conversation
        self.heard: list[FrameOut] = []
        self.error: BaseException | None = None
        self.said = 0
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for frame in self.conversation.frames():
                self.heard.append(frame)
        except ServingError as error:
            self.error = error

    async def say(self, frames: int, *, run: bool = True) -> None:
        """In real time."""
        for _ in range(frames):
            await self.conversation.send(spoken(self.said))
            self.said += 1
            await self.world.clock.advance(0.08)
            if run:
                await self.world.run(4)

    def assert_undisturbed(self) -> None:
        assert [frame.key.frame for frame in self.heard] == list(range(len(self.heard)))
        assert [frame.text_token for frame in self.heard] == undisturbed(len(self.heard))

    async def stop(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


@asynccontextmanager
async def calling(world: World) -> AsyncIterator[Caller]:
    async with world.hub.open(SPEC, TENANT, "test") as conversation:
        caller = Caller(world, conversation)
        try:
            await world.run()
            await conversation.ready()
            yield caller
        finally:
            await caller.stop()
    await world.assert_nothing_is_left()


async def run(world: World, work: Any) -> Any:
    """The result of something that waits for the world."""
    task = asyncio.ensure_future(work)
    for _ in range(20):
        await world.run(4)
        if task.done():
            break
    return await task


async def talk(world: World, conversation: Conversation, frames: int) -> list[FrameOut]:
    """Say the next frames, hear what comes."""
    for _ in range(frames):
        await conversation.send(spoken(conversation.frames_sent))
        await world.clock.advance(0.08)
        await world.run(4)
    return hear(conversation)


def hear(conversation: Conversation) -> list[FrameOut]:
    frames = []
    while (frame := conversation._queue.take()) is not None:
        frames.append(frame)
    return frames

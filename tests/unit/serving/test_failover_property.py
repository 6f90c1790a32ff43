"""Whatever happens to its replicas, in whatever order: a client hears every frame once, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ServingError
from actors.messages import Failed, FrameOut
from serving.conversation import Conversation
from tests.failover_fakes import TENANT, World
from tests.fake_clock import settle
from tests.fake_replica import SPEC, spoken, undisturbed

REPLICAS = 3
replica = st.integers(0, REPLICAS - 1)
few = st.integers(1, 4)
CODES = ("engine_lost", "stale_epoch", "internal", "draining", "conversation_broken")

happenings = st.lists(
    st.one_of(
        st.tuples(st.just("say"), few),
        st.tuples(st.just("say"), few),
        st.tuples(st.just("run"), few),
        st.tuples(st.just("run"), few),
        st.tuples(st.just("turns"), st.integers(1, 30)),
        st.tuples(st.just("work"), replica, few),
        st.tuples(st.just("flush"), replica, few),
        st.tuples(st.just("die"), replica),
        st.tuples(st.just("rise"), replica),
        st.tuples(st.just("fail"), replica, st.sampled_from(CODES)),
        st.tuples(st.just("move"), replica),
        st.tuples(st.just("echo"), replica, st.integers(0, 200)),
        st.tuples(st.just("time"), st.floats(0.05, 1.5)),
        st.tuples(st.just("router"), st.sampled_from(("away", "commits_refused", "commits_unheard")), st.booleans()),
        st.tuples(st.just("gate"), st.booleans()),
    ),
    max_size=60,
)


class Story:
    """One conversation in a world where things happen."""

    def __init__(self) -> None:
        self.world = World(REPLICAS, recovery_s=10_000.0, idle_timeout_s=10_000.0, ready_timeout_s=10_000.0)
        self.heard: list[FrameOut] = []
        self.error: ServingError | None = None
        self._said = 0
        self._saying: asyncio.Task[None] | None = None

    async def tell(self, what: list[tuple[Any, ...]], *, heal: bool) -> None:
        world = self.world
        async with world.hub.open(SPEC, TENANT, "test") as conversation:
            reading = asyncio.create_task(self._read(conversation))
            try:
                for name, *arguments in what:
                    await self._happen(conversation, name, arguments)
                if heal:
                    await self._heal(conversation)
            finally:
                for task in (reading, self._saying):
                    if task is not None:
                        task.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        self._calm()
        await world.assert_nothing_is_left()

    async def _read(self, conversation: Conversation) -> None:
        try:
            async for frame in conversation.frames():
                self.heard.append(frame)
        except ServingError as error:
            self.error = error

    async def _say(self, conversation: Conversation, frames: int) -> None:
        for _ in range(frames):
            await conversation.send(spoken(self._said))
            self._said += 1

    async def _happen(self, conversation: Conversation, name: str, arguments: list[Any]) -> None:
        world, replicas = self.world, list(self.world.replicas.values())
        match name, *arguments:
            case "say", frames:
                if self._saying is None or self._saying.done():
                    self._saying = asyncio.create_task(self._say(conversation, frames))
                await world.clock.advance(0.08 * frames)
            case "run", turns:
                await world.run(turns)
            case "turns", turns:
                await settle(turns)
            case "work", index, messages:
                replicas[index].work(messages)
            case "flush", index, messages:
                replicas[index].flush(messages)
            case "die", index:
                replicas[index].die()
            case "rise", index:
                replicas[index].alive = True
            case "fail", index, code:
                replicas[index].lose_engine(code)
            case "move", index:
                replicas[index].ask_to_move()
            case "echo", index, which:
                self._echo(replicas[index].delivered, which)
            case "time", seconds:
                await world.clock.advance(seconds)
            case "router", flag, on:
                setattr(world.router, flag, on)
            case "gate", is_open:
                (world.router.gate.set if is_open else world.router.gate.clear)()

    def _echo(self, delivered: list[tuple[Callable[[Any], None], Any]], which: int) -> None:
        """Something is said again, late: by whom it was said, whether he still has the conversation or not."""
        if delivered:
            sink, message = delivered[which % len(delivered)]
            if not isinstance(message, Failed):  # said once, by a home that is then left
                sink(message)

    def _calm(self) -> None:
        router = self.world.router
        router.away = router.commits_refused = router.commits_unheard = False
        router.gate.set()
        for each in self.world.replicas.values():
            each.alive = True

    async def _heal(self, conversation: Conversation) -> None:
        """All is well again: what was said is answered, and so is what comes now."""
        self._calm()
        await self.world.pass_time(4.0)
        await self.world.run()
        for _ in range(8):
            if self._saying is None or self._saying.done():
                self._saying = asyncio.create_task(self._say(conversation, 1))
            await self.world.pass_time(0.2)
        await self.world.pass_time(2.0)
        assert self.error is None
        assert conversation.residence.settled
        assert len(self.heard) == self._said > 0
        assert [frame.key.frame for frame in self.heard] == list(range(self._said))
        assert [frame.text_token for frame in self.heard] == undisturbed(self._said)
        assert len(self.heard[-1].pcm), "in time again"
        held = [each for each in self.world.replicas.values() if each.held]
        assert len(held) == 1, "one slot, at its home"
        assert len(self.world.router.leases) == 1
        assert self.world.router.pending == {}


@settings(max_examples=120, deadline=None)
@given(happenings)
def test_every_frame_is_heard_once_and_in_order(what: list[tuple[Any, ...]]) -> None:
    asyncio.run(Story().tell(what, heal=True))


@settings(max_examples=120, deadline=None)
@given(happenings)
def test_an_end_at_any_moment_leaves_nothing(what: list[tuple[Any, ...]]) -> None:
    asyncio.run(Story().tell(what, heal=False))

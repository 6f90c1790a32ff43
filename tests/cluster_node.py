"""One replica of a cluster without processes: the real thing on stages of arithmetic, and how it is cut off or dies."""

from __future__ import annotations

import asyncio

from actors.codec_stage import DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.interfaces import ReplicaSettings
from actors.messages import ReplicaReport
from actors.replica import Replica
from graphs.stages import SessionSpec
from serving.router import SessionRouter
from tests.actor_fakes import Tokenizer, frame_in, seed_of
from tests.fake_clock import FakeClock, settle
from tests.stage_fakes import CARD, FakeDecoderLane, FakeEncoderLane, FakeEngine, Handle

GRACE_S = 10.0
TURNS = 60  # of the event loop: a frame's way through three fake stages and back takes some twenty


class Node:
    """One replica, its stages, and how it is cut off."""

    def __init__(self, name: str, slots: int, clock: FakeClock) -> None:
        self.name, self.clock = name, clock
        self.alive = True
        self.deaf = False  # cut off from the router
        self.far = False  # cut off from all ingresses
        self.told_to_drain = False
        self.replica = Replica(
            *self._stages(slots),
            slots=slots,
            tokenizer=Tokenizer(),
            numerics_id="fake",
            settings=ReplicaSettings(window_s=0.0, resume_grace_s=GRACE_S),
            clock=clock,
        )
        self._run = asyncio.create_task(self.replica.run())

    def _stages(self, slots: int) -> tuple[Handle, Handle, Handle]:
        self.engine = Handle(EngineStage(FakeEngine(slots, prompt_steps=2), slots, CARD))
        return (
            Handle(EncoderStage(FakeEncoderLane(slots), slots)),
            self.engine,
            Handle(DecoderStage(FakeDecoderLane(slots), slots, CARD)),
        )

    @property
    def reachable(self) -> bool:
        return self.alive and not self.far

    def report(self) -> ReplicaReport:
        it = self.replica
        held = tuple(it.report())
        slots = it.slots - max(0, it.busy - len(held))
        return ReplicaReport(self.name, f"node of {self.name}", self.name, slots, it.numerics_id, it.admitting, held)

    def beat(self, router: SessionRouter) -> None:
        """One report, and what comes of it."""
        if self.deaf or not self.alive:
            return
        at_s = self.clock.now()
        reply = router.report(self.report())
        self.replica.renewed(at_s, reply.lease_s)
        for session, epoch in reply.close:
            self.replica.revoke(session, epoch, "no lease")
        if reply.drain:
            self.told_to_drain = True
            self.replica.drain()

    async def lose_engine(self) -> None:
        """The engine dies with the next thing that is asked of it; it is found, and all three stages are replaced."""
        self.engine.errors = dict.fromkeys(("open", "step", "close"), RuntimeError("killed"))
        await self.replica.probe()
        await settle(TURNS)

    async def revive(self) -> None:
        await self._run
        self.replica.revive(*self._stages(self.replica.slots))
        self._run = asyncio.create_task(self.replica.run())
        await settle(5)

    async def die(self) -> None:
        """By SIGKILL: nobody is told, nothing of it is ever heard again."""
        self.alive = False
        for call in list(self.replica._calls):
            call.sink = lambda message: None
        await self.stop()

    async def stop(self) -> None:
        self.alive = False
        await self.replica.stop()
        await self._run


class Undisturbed:
    """The run of a conversation that nothing happens to."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.encoder, self.engine, self.decoder = FakeEncoderLane(1), FakeEngine(1, 1), FakeDecoderLane(1)
        self.engine.open(0, SessionSpec("voice", "", seed_of(session)))
        self.engine.left.clear()
        self.frames: list[tuple[list[int], int]] = []

    def frame(self, number: int) -> tuple[list[int], int]:
        """(text token and codes, a sample)"""
        while len(self.frames) <= number:
            pcm = frame_in(self.session, len(self.frames)).pcm
            tokens = self.engine.step((0,), self.encoder.run((0,), pcm[None])).tokens
            self.frames.append((tokens[0].tolist(), int(self.decoder.run((0,), tokens[:, 1:])[0, 0])))
        return self.frames[number]

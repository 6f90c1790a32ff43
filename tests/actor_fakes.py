"""A real replica on stages of arithmetic, who listens to it, and what each conversation must hear."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actors.codec_stage import DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.interfaces import ReplicaSettings
from actors.journal import Journal
from actors.journal_parts import PartsBin
from actors.messages import Down, Failed, FrameIn, FrameOut, JournalPart, Move, Need, OpenRequest, Ready
from actors.replica import Replica
from graphs.stages import FrameKey, SessionSpec
from tests.fake_clock import FakeClock, settle
from tests.stage_fakes import CARD, FakeDecoderLane, FakeEncoderLane, FakeEngine, Handle

T = TypeVar("T")


class Sink(list[Down]):
    """Collects what a replica tells one conversation."""

    def __call__(self, message: Down) -> None:
        self.append(message)

    def of(self, kind: type[T]) -> list[T]:
        return [message for message in self if isinstance(message, kind)]

    @property
    def ready(self) -> list[Ready]:
        return self.of(Ready)

    @property
    def frames(self) -> list[FrameOut]:
        return self.of(FrameOut)

    @property
    def failed(self) -> list[Failed]:
        return self.of(Failed)

    @property
    def needs(self) -> list[Need]:
        return self.of(Need)

    @property
    def moves(self) -> list[Move]:
        return self.of(Move)

    @property
    def journal(self) -> Journal:
        """That which came in parts before the last Ready."""
        held = PartsBin()
        parts = self.of(JournalPart)
        for part in parts:
            held.add(part, 0.0)
        return Journal.from_bytes(held.take(parts[-1].session, parts[-1].epoch))


class Tokenizer:
    def piece(self, token_id: int) -> str:
        return "" if token_id in (0, 3) else f" w{token_id}"


class Metrics:
    def __init__(self) -> None:
        self.frame_ms: list[float] = []
        self.misses: Counter[int] = Counter()
        self.batches: dict[str, list[int]] = defaultdict(list)

    def observe_frame_ms(self, frame_ms: float) -> None:
        self.frame_ms.append(frame_ms)

    def deadline_miss(self, slot: int) -> None:
        self.misses[slot] += 1

    def batch_size(self, stage: str, frames: int) -> None:
        self.batches[stage].append(frames)


class Bench:
    """A running replica on fakes, and what a test needs to drive it. Use as an async context manager."""

    def __init__(
        self,
        slots: int = 4,
        prompt_steps: int = 3,
        settings: ReplicaSettings | None = None,
        turns: Callable[[], int] = lambda: 1,
    ) -> None:
        self.clock = FakeClock()
        self.metrics = Metrics()
        self.engine = FakeEngine(slots, prompt_steps)
        self.encoder = Handle(EncoderStage(FakeEncoderLane(slots), slots), turns)
        self.converse = Handle(EngineStage(self.engine, slots, CARD), turns)
        self.decoder = Handle(DecoderStage(FakeDecoderLane(slots), slots, CARD), turns)
        self.handles = {"encoder": self.encoder, "converse": self.converse, "decoder": self.decoder}
        self.replica = Replica(
            self.encoder,
            self.converse,
            self.decoder,
            slots=slots,
            tokenizer=Tokenizer(),
            numerics_id="fake",
            settings=settings or ReplicaSettings(window_s=0.0),
            clock=self.clock,
            metrics=self.metrics,
        )
        self._run: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Bench:
        self._run = asyncio.create_task(self.replica.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        for handle in self.handles.values():
            for pause in handle._pauses.values():
                pause.go.set()
        await self.replica.stop()
        assert self._run is not None
        await self._run
        assert self.replica.busy == 0
        assert not self.engine.open_slots or not self.replica.healthy

    async def open(self, session: str, epoch: int = 1, **spec: Any) -> Sink:
        sink = Sink()
        await self.replica.open(request(session, epoch, **spec), sink)
        return sink

    async def talk(self, session: str, frames: range, epoch: int = 1) -> None:
        """Offers frames one by one, each as soon as nothing more happens to the one before."""
        for frame in frames:
            self.replica.offer(frame_in(session, frame, epoch))
            await settle(40)


def request(session: str, epoch: int = 1, tenant: str = "t", role: str = "", seed: int | None = None) -> OpenRequest:
    spec = SessionSpec("voice", role, seed_of(session) if seed is None else seed)
    return OpenRequest(session, epoch, tenant, "ingress-1", spec)


def seed_of(session: str) -> int:
    return sum(session.encode()) * 101


def frame_in(session: str, frame: int, epoch: int = 1) -> FrameIn:
    pcm = np.full(1920, (seed_of(session) + 37 * frame) % 20_000, dtype=np.int16)
    return FrameIn(FrameKey(session, epoch, frame), pcm)


class Spoken(NamedTuple):
    """What must come out for one frame."""

    text_token: int
    codes: tuple[int, ...]
    sample: int


def alone(session: str, frames: int) -> list[Spoken]:
    """What a conversation says when it is the only one: computed without gates, queues or replica."""
    encoder, engine, decoder = FakeEncoderLane(1), FakeEngine(1, prompt_steps=1), FakeDecoderLane(1)
    engine.open(0, request(session).spec)
    engine.step((), np.zeros((0, 8), dtype=np.int16))
    out = []
    for frame in range(frames):
        tokens = engine.step((0,), encoder.run((0,), frame_in(session, frame).pcm[None])).tokens
        pcm = decoder.run((0,), tokens[:, 1:])
        out.append(Spoken(int(tokens[0, 0]), tuple(tokens[0, 1:].tolist()), int(pcm[0, 0])))
    return out


def heard(sink: Sink) -> list[Spoken]:
    return [Spoken(out.text_token, tuple(out.codes.tolist()), int(out.pcm[0])) for out in sink.frames]


def numbers(sink: Sink) -> list[int]:
    return [out.key.frame for out in sink.frames]

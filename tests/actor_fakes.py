"""Stages, clock and sinks for tests of actors.replica: real gates around arithmetic in place of a model."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from actors.codec_stage import DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.interfaces import ReplicaSettings
from actors.journal import Journal
from actors.journal_parts import PartsBin
from actors.messages import Down, Failed, FrameIn, FrameOut, JournalPart, Move, Need, OpenRequest, Ready
from actors.replica import Replica
from graphs.stages import FrameKey, Past, PromptInfo, SessionSpec, StageBatch

T = TypeVar("T")
Rows = npt.NDArray[np.int16]
CARD = 2048


class FakeClock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.time = 0.0
        self._timers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self.time

    async def wait_for(self, what: Awaitable[T], timeout_s: float) -> T:
        task = asyncio.ensure_future(what)
        timer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (self.time + timeout_s, timer)
        self._timers.append(entry)
        try:
            await asyncio.wait({task, timer}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise TimeoutError
        finally:
            self._timers.remove(entry)
            timer.cancel()
            task.cancel()

    async def advance(self, seconds: float) -> None:
        self.time += seconds
        for due, timer in list(self._timers):
            if due <= self.time and not timer.done():
                timer.set_result(None)
        await settle()


async def settle(turns: int = 200) -> None:
    """Lets everything run that can run without time passing."""
    for _ in range(turns):
        await asyncio.sleep(0)


class FakeLane:
    """What a rebuild asks of a lane beside its work. These remember everything, so they are rebuilt from the start."""

    group, run_most = 4, 1

    def run(self, slots: Sequence[int], data: Rows) -> Rows:
        raise NotImplementedError

    def replay(self, slots: Sequence[int], data: Rows, *, outputs: bool) -> None:
        del outputs
        self.run(slots, data[:, 0])

    def snapshot(self, slot: int) -> Any:
        raise AssertionError("a stream that remembers everything cannot go on from the middle")

    restore = snapshot


class FakeEncoderLane(FakeLane):
    """Codes that depend on all PCM a slot has heard since its reset."""

    def __init__(self, slots: int) -> None:
        self.state = [0] * slots

    def run(self, slots: Sequence[int], data: Rows) -> Rows:
        out = np.zeros((len(slots), 8), dtype=np.int16)
        for i, slot in enumerate(slots):
            self.state[slot] = (self.state[slot] * 31 + int(data[i, 0]) + 7) % CARD
            out[i] = (self.state[slot] + np.arange(8)) % CARD
        return out

    def reset(self, slot: int) -> None:
        self.state[slot] = 0


class FakeDecoderLane(FakeLane):
    def __init__(self, slots: int) -> None:
        self.state = [0] * slots

    def run(self, slots: Sequence[int], data: Rows) -> Rows:
        out = np.zeros((len(slots), 1920), dtype=np.int16)
        for i, slot in enumerate(slots):
            self.state[slot] = (self.state[slot] * 17 + int(data[i].sum()) + 3) % 30_000
            out[i] = self.state[slot]
        return out

    def reset(self, slot: int) -> None:
        self.state[slot] = 0


class FakeStep(NamedTuple):
    tokens: Rows
    journal: Rows
    ready: tuple[int, ...]
    pending: int
    next_columns: Rows
    first_rows: npt.NDArray[np.int32]


class FakeEngine:
    """Tokens that depend on the seed and on all codes a slot was given; a prompt takes `prompt_steps` steps.

    A role of "bad" is refused, as a role that is too long would be.
    """

    def __init__(self, slots: int, prompt_steps: int = 3) -> None:
        self.prompt_steps = prompt_steps
        self.state = [0] * slots
        self.left: dict[int, int] = {}
        self.open_slots: set[int] = set()
        self.steps = 0

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> PromptInfo:
        if spec.role == "bad":
            raise ValueError("This role cannot be taken: shorten it.")
        assert slot not in self.open_slots
        self.open_slots.add(slot)
        self.left[slot] = self.prompt_steps
        self.state[slot] = spec.seed % 9973
        if past is not None:
            assert past.first_row == 0
            assert past.rows[0, 0] == self.state[slot], "the journal of another conversation"
            for row in past.rows:
                assert row[0] == self.state[slot]
                self._hear(slot, row[9:])
        return PromptInfo(10 * self.prompt_steps, f"hash-of-{spec.voice}")

    def step(self, slots: Sequence[int], codes: Rows) -> FakeStep:
        self.steps += 1
        tokens = np.zeros((len(slots), 9), dtype=np.int16)
        journal = np.zeros((len(slots), 17), dtype=np.int16)
        for i, slot in enumerate(slots):
            assert slot in self.open_slots
            assert slot not in self.left, "stepped before it was ready"
            journal[i, 0] = self.state[slot]
            journal[i, 9:] = codes[i]
            self._hear(slot, codes[i])
            tokens[i, 0] = self.state[slot] % 100
            tokens[i, 1:] = (self.state[slot] + np.arange(8)) % CARD
        ready = []
        for slot in list(self.left):
            self.left[slot] -= 1
            if self.left[slot] == 0:
                del self.left[slot]
                ready.append(slot)
        begun = np.where(journal > 0, journal - 1, np.int16(-2))
        return FakeStep(tokens, journal, tuple(ready), len(self.left), begun, np.zeros(len(slots), dtype=np.int32))

    def _hear(self, slot: int, codes: Rows) -> None:
        self.state[slot] = (self.state[slot] * 13 + int(codes.sum()) + 1) % 9973

    def close(self, slot: int) -> None:
        self.open_slots.discard(slot)
        self.left.pop(slot, None)


@dataclass
class Pause:
    """A point at which a stage's call stands still until it is let go."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)


class Handle:
    """An actor in miniature: one call after the other, in order; can be paused before or after its work, made to
    fail, or to take a random number of turns."""

    def __init__(self, stage: Any, turns: Callable[[], int] = lambda: 1) -> None:
        self.stage = stage
        self.calls: list[str] = []
        self.batches: list[StageBatch] = []
        self.errors: dict[str, Exception] = {}
        self.behind: bool | None = None  # how its last rebuild was to go
        self.hurried = 0
        self._pauses: dict[tuple[str, str], Pause] = {}
        self._turns = turns
        self._lock = asyncio.Lock()

    def pause(self, method: str, when: str = "before") -> Pause:
        pause = self._pauses[method, when] = Pause()
        return pause

    async def _reach(self, method: str, when: str) -> None:
        pause = self._pauses.pop((method, when), None)
        if pause is not None:
            pause.reached.set()
            await pause.go.wait()

    async def _do(self, method: str, *args: Any) -> Any:
        async with self._lock:
            for _ in range(self._turns()):
                await asyncio.sleep(0)
            await self._reach(method, "before")
            self.calls.append(method)
            if method in self.errors:
                raise self.errors[method]
            result = getattr(self.stage, method)(*args)
        await self._reach(method, "after")
        return result

    async def open(self, *args: Any) -> Any:
        return await self._do("open", *args)

    async def close(self, session: str, epoch: int) -> None:
        await self._do("close", session, epoch)

    async def rebuild(self, budget_s: float, *, behind: bool) -> Any:
        self.behind = behind
        return await self._do("rebuild", budget_s)

    def hurry(self) -> None:
        self.hurried += 1

    async def step(self, batch: StageBatch) -> Any:
        self.batches.append(batch)
        return await self._do("step", batch)


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

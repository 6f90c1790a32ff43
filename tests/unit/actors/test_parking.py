"""Calls whose engine has no memory for them for a while: they wait, say nothing wrong, and go on where they stood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from actors.converse_stage import REPORT_EVERY, EngineStage
from actors.errors import NoCapacity
from graphs.anchors import AnchorPolicy
from graphs.backends import Backends
from graphs.kv_pressure import MIGRATE_ONE, KVPressure
from graphs.slot_engine import SlotEngine, StepOut
from graphs.stages import FrameKey, MemoryReport, Past, PromptInfo, SessionSpec, StageBatch, Verdict
from tests.actor_fakes import Bench, alone, frame_in, heard
from tests.fake_clock import settle
from tests.stage_fakes import CARD, NO_FRAMES, FakeEngine
from tests.unit.graphs.small import SMALL, small_model
from tests.unit.graphs.test_kv_pressure import alone as engine_alone
from tests.unit.graphs.test_kv_pressure import prompt_of, words

SESSIONS = "abcd"


class PagedEngine:
    """Two contexts for four slots, opened by spec; the seed says which of test_kv_pressure's callers it is."""

    def __init__(self) -> None:
        chosen = Backends(kv_overcommit=2.2, kv_reserve_s=0.5)
        self.slots = SlotEngine(small_model(torch.float32), 4, backend=chosen, anchors=AnchorPolicy(every=120, lead=20))

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> PromptInfo:
        prompt = prompt_of(30 + spec.seed, spec.seed)
        self.slots.open(slot, prompt, spec.sampling, spec.seed, past=past)
        return PromptInfo(prompt.frames, prompt.digest)

    def step(self, slots: Sequence[int], codes: np.ndarray) -> StepOut:
        return self.slots.step(slots, codes)

    def close(self, slot: int) -> None:
        self.slots.close(slot)

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        return self.slots.make_room(slots)

    @property
    def parked(self) -> Sequence[int]:
        return self.slots.parked

    @property
    def pressure(self) -> KVPressure | None:
        return self.slots.pressure


def test_a_stage_answers_parked_frames_with_need_and_says_when_they_may_come_again() -> None:
    """Four calls, two contexts, nobody moves: every frame is answered in the end, with the tokens of a call alone."""
    frames, engine = 300, PagedEngine()
    stage = EngineStage(engine, 4, SMALL.card, memory=engine)
    expected = {session: engine_alone(small_model(torch.float32), i, frames) for i, session in enumerate(SESSIONS)}
    said: dict[str, list[np.ndarray]] = {session: [] for session in SESSIONS}
    live: set[str] = set()
    reports: list[MemoryReport] = []
    for slot, session in enumerate(SESSIONS):
        stage.open(session, 1, slot, SessionSpec("v", "", slot))
    waited = 0
    for _ in range(20 * frames):
        talking = [session for session in SESSIONS if session in live and len(said[session]) < frames]
        keys = tuple(FrameKey(session, 1, len(said[session])) for session in talking)
        codes = [words(SESSIONS.index(session), len(said[session])) for session in talking]
        reply = stage.step(StageBatch(keys, np.stack(codes)) if keys else NO_FRAMES)
        for session, verdict, detail, tokens in zip(
            talking, reply.frames.verdicts, reply.frames.details, reply.frames.data, strict=True
        ):
            if verdict is Verdict.NEED:
                assert detail == len(said[session]), "the very frame that was offered"
                live.discard(session)
                waited += 1
            else:
                assert verdict is Verdict.DONE
                said[session].append(tokens)
                if len(said[session]) == frames:
                    stage.close(session, 1)
        live |= {session for session, _ in reply.ready}
        if reply.memory is not None:
            reports.append(reply.memory)
        if all(len(tokens) == frames for tokens in said.values()):
            break
    assert waited, "the pool was never short: the test tests nothing"
    for session in SESSIONS:
        assert np.array_equal(np.stack(said[session]), expected[session]), session
    pressing = [report for report in reports if report.pressure]
    assert pressing
    assert all(report.pressure == MIGRATE_ONE and report.migrate and report.room == 0 for report in pressing)
    assert any(report.parked for report in reports)


def test_a_full_stage_refuses_a_new_call_and_holds_nothing_of_it() -> None:
    engine = PagedEngine()
    stage = EngineStage(engine, 4, SMALL.card, memory=engine)
    for slot, session in enumerate("abc"):
        stage.open(session, 1, slot, SessionSpec("v", "", slot))
    while len(engine.slots._prefilling):
        stage.step(NO_FRAMES)
    for frame in range(400):
        keys = tuple(FrameKey(session, 1, frame) for session in "abc")
        stage.step(StageBatch(keys, np.stack([words(slot, frame) for slot in range(3)])))
        if engine.pressure is not None and engine.pressure.pressure:
            break
    with pytest.raises(NoCapacity, match="promised to others"):
        stage.open("d", 1, 3, SessionSpec("v", "", 3))
    stage.close("a", 1)
    stage.open("d", 2, 3, SessionSpec("v", "", 3))


# ---- the replica -----------------------------------------------------------------------------------------------------


class Memory:
    """Parks what a test says, and names it ready when the test lets it go."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.parked = engine, list[int]()
        self.pressure = KVPressure(pages=4, free_pages=1, room=1)

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        return tuple(slot for slot in slots if slot in self.parked)

    def let_go(self, slot: int) -> None:
        self.parked.remove(slot)
        self.engine.left[slot] = 2  # steps of a rebuild


def paged(bench: Bench) -> Memory:
    memory = Memory(bench.engine)
    bench.converse.stage = EngineStage(bench.engine, 4, CARD, memory=memory)
    return memory


async def test_a_parked_call_keeps_its_frames_and_hears_them_answered_in_order() -> None:
    async with Bench() as bench:
        memory = paged(bench)
        first, second = await bench.open("a"), await bench.open("b")
        await settle()
        await bench.talk("a", range(3))
        memory.parked.append(0)
        memory.pressure = KVPressure(pages=4, room=0, pressure=MIGRATE_ONE, migrate=(0,), parked=(0,))
        for frame in range(3, 8):
            bench.replica.offer(frame_in("a", frame))
            bench.replica.offer(frame_in("b", frame - 3))
            await settle()
        assert len(heard(first)) == 3, "it is parked"
        assert heard(second) == alone("b", 5), "the other one talks on"
        assert bench.replica.room == 0
        assert [move.session for move in first.moves], "it was asked to leave"
        steps = bench.engine.steps
        await settle()
        assert bench.engine.steps == steps, "nobody turns in circles while it waits"
        memory.let_go(0)
        bench.replica.offer(frame_in("b", 5))  # the next step of anybody's sees that there is room
        await settle()
        assert heard(first) == alone("a", 8), "in order, none lost"
        await bench.talk("a", range(8, 10))
        assert heard(first) == alone("a", 10)


async def test_a_parked_call_goes_on_when_the_last_other_one_has_gone() -> None:
    async with Bench() as bench:
        memory = paged(bench)
        first = await bench.open("a")
        await bench.open("b")
        await settle()
        memory.parked.append(0)
        bench.replica.offer(frame_in("a", 0))
        await settle()
        assert not heard(first)
        memory.let_go(0)
        await bench.replica.close("b", 1, "gone")
        await settle()
        assert heard(first) == alone("a", 1)


async def test_a_parked_call_that_is_closed_leaves_nothing() -> None:
    async with Bench() as bench:
        memory = paged(bench)
        await bench.open("a")
        await settle()
        memory.parked.append(0)
        bench.replica.offer(frame_in("a", 0))
        await settle()
        await bench.replica.close("a", 1, "gone")
        assert bench.replica.busy == 0
        assert REPORT_EVERY > 1

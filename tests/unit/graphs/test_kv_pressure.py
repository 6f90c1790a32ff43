"""Pages running short: foreseen to the frame, told in time, and survived when nobody listens."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphs.anchors import AnchorPolicy
from graphs.backends import Backends
from graphs.kv_pressure import MIGRATE_ONE, Holding, PressurePolicy
from graphs.paging import OutOfPages, pages_for
from graphs.slot_engine import SlotEngine
from graphs.stages import Past, Sampling
from models.config import FRAMES_PER_S
from models.lm import LanguageModel
from models.prompt import Prompt, build_prompt
from tests.golden import NOBODY, CodesVoice
from tests.unit.graphs.small import SMALL, small_model

BLOCKS = 24


# ---- the policy: pure, against a conversation that is played frame by frame ------------------------------------------

holdings = st.builds(
    lambda known, anchored, anchor_in, kept: Holding(
        0, known, pages_for(known, BLOCKS), anchor_in=anchor_in if anchored else None, kept=min(kept, known)
    ),
    known=st.integers(1, 2999),
    anchored=st.booleans(),
    anchor_in=st.integers(0, 1500),
    kept=st.integers(1, 2000),
)


@given(holdings, st.integers(0, 2000))
def test_what_is_owed_is_what_a_conversation_takes(holding: Holding, frames: int) -> None:
    """Played: a page whenever a frame begins one; at the anchor the old ring's are gone before the new one's come."""
    worst, held, written = 0, holding.held, holding.known
    for frame in range(frames):
        if holding.anchor_in == frame:
            held, written = pages_for(holding.kept, BLOCKS), holding.kept
        written += 1
        held = max(held, pages_for(written, BLOCKS))
        worst = max(worst, held - holding.held)
    assert holding.owed(frames, BLOCKS) == max(worst, 0)


@given(st.lists(holdings, min_size=1, max_size=8), st.integers(0, 200), st.integers(1, 40))
def test_reports(talks: list[Holding], free: int, reserve_s: int) -> None:
    policy = PressurePolicy(BLOCKS, float(reserve_s))
    talks = [replace(talk, slot=slot) for slot, talk in enumerate(talks)]
    report = policy.report(1000, free, talks)
    frames = round(report.seconds_left * FRAMES_PER_S)
    assert policy.owed(talks, frames) <= free or frames == 0
    assert frames == policy.reserve_frames or policy.owed(talks, frames + 1) > free
    if report.pressure:
        assert report.room == 0, "nobody is let in under pressure"
        assert not policy.admits(free, talks, 1)
        assert report.migrate
        left = [talk for talk in talks if talk.slot not in report.migrate]
        gone = sum(talk.held for talk in talks if talk.slot in report.migrate)
        assert policy.owed(left, 2 * policy.reserve_frames) <= free + gone
    else:
        assert frames == policy.reserve_frames
        assert report.room is not None
        assert policy.admits(free, talks, policy.typical) == (report.room > 0)


def test_who_is_to_move_is_the_cheapest_that_helps() -> None:
    policy = PressurePolicy(BLOCKS, 10.0)  # 125 frames, a page each; two reserves are two pages each
    small, middle, large = (
        Holding(slot, known, pages_for(known, BLOCKS)) for slot, known in enumerate((100, 900, 2000))
    )
    assert policy.report(40, 2, [small, middle, large]).migrate == (0,), "three short, and it brings three"
    assert policy.report(40, 1, [small, middle, large]).migrate == (1,), "four short"
    assert policy.report(40, 1, [small, replace(middle, live=False), large]).migrate == (2,)
    crowd = [Holding(slot, 120, 1) for slot in range(20)]
    assert len(policy.report(20, 0, crowd).migrate) > 5, "nobody is enough alone"
    assert policy.report(40, 30, [small, middle, large]).migrate == ()


# ---- the engine: small rings, few pages -----------------------------------------------------------------------------


def prompt_of(frames: int, seed: int) -> Prompt:
    dice = np.random.default_rng(seed)
    codes = torch.from_numpy(dice.integers(0, SMALL.card, (20, 8)))
    constant = (1,) * 8
    tokens = dice.integers(4, SMALL.text_card, frames).tolist()
    return build_prompt(SMALL, CodesVoice(codes), tokens, silence_codes=constant, sine_codes=constant)


def engine_of(model: LanguageModel, slots: int, overcommit: float, reserve_s: float = 2.0) -> SlotEngine:
    chosen = Backends(kv_overcommit=overcommit, kv_reserve_s=reserve_s)
    return SlotEngine(model, slots, tile=64, backend=chosen, anchors=AnchorPolicy(every=120, lead=20))


def ready(engine: SlotEngine, slot: int, prompt: Prompt, past: Past | None = None) -> None:
    engine.open(slot, prompt, Sampling(), slot, past=past)
    while slot not in engine.step([], NOBODY).ready:
        pass


def words(slot: int, frame: int) -> np.ndarray:
    codes: np.ndarray = np.random.default_rng(10_000 * slot + frame).integers(0, SMALL.card, 8).astype(np.int16)
    return codes


def alone(model: LanguageModel, slot: int, frames: int) -> np.ndarray:
    """What a conversation says with a full context of its own."""
    engine = engine_of(model, slot + 1, 1.0)
    assert engine.cache.pool is None
    ready(engine, slot, prompt_of(30 + slot, slot))
    return np.stack([engine.step([slot], words(slot, frame)[None]).tokens[0] for frame in range(frames)])


class Talkers:
    """Callers who speak whenever they are let; what each has heard."""

    def __init__(self, engine: SlotEngine) -> None:
        self.engine = engine
        self.live: set[int] = set()
        self.heard: dict[int, list[np.ndarray]] = {}
        self.rows: dict[int, list[np.ndarray]] = {}
        self.pending: dict[int, np.ndarray] = {}
        self.first_row: dict[int, int] = {}

    def tick(self) -> tuple[int, ...]:
        """A frame of everybody's; returns those who could not be served."""
        wanting = sorted(self.live)
        parked = self.engine.make_room(wanting)
        speakers = [slot for slot in wanting if slot not in parked]
        codes = [words(slot, len(self.heard[slot])) for slot in speakers]
        out = self.engine.step(speakers, np.stack(codes) if codes else NOBODY)
        for i, slot in enumerate(speakers):
            self.heard[slot].append(out.tokens[i])
            self.rows[slot].append(out.journal[i])
            self.pending[slot], self.first_row[slot] = out.next_columns[i], int(out.first_rows[i])
        self.live -= set(parked)
        self.live |= set(out.ready)
        return parked

    def open(self, slot: int) -> None:
        self.engine.open(slot, prompt_of(30 + slot, slot), Sampling(), slot)
        self.heard[slot], self.rows[slot] = [], []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_a_mover_nobody_ever_lacks_a_page(seed: int) -> None:
    """Callers come whenever they are let and stay for long; whoever is suggested is moved within the reserve."""
    dice, model = random.Random(seed), small_model(torch.float32)
    engine = engine_of(model, 8, 2.5, reserve_s=2.0)  # 9 rings' worth of 5 pages: 18 of 45
    pool = engine.cache.pool
    assert pool is not None
    callers, moving, pressed, refused, moved = Talkers(engine), {}, 0, 0, 0
    for frame in range(700):
        for slot in range(8):
            if slot not in callers.heard and dice.random() < 0.05:
                try:
                    callers.open(slot)
                except OutOfPages:
                    refused += 1
        if callers.live:
            assert callers.tick() == (), "a live call was without a page"
        else:
            callers.live |= set(engine.step([], NOBODY).ready)
        told = engine.pressure
        assert told is not None
        assert told.parked == ()
        if told.pressure == MIGRATE_ONE:
            pressed += 1
            assert told.room == 0
            if not moving:
                moving = {slot: frame + dice.randrange(1, 20) for slot in told.migrate}  # of 25 that are promised
        for slot, due in list(moving.items()):
            if frame >= due:
                engine.close(slot)
                callers.live.discard(slot)
                del moving[slot], callers.heard[slot]
                moved += 1
    assert pressed, "the pool was never short: the test tests nothing"
    assert refused
    assert moved > 2
    for slot in range(8):
        engine.close(slot)
    assert pool.free == pool.pages


def test_without_a_mover_the_youngest_waits_and_everybody_goes_on() -> None:
    """Four calls share two contexts and nobody is moved: some are parked, and all say what they say alone."""
    model, frames = small_model(torch.float32), 420
    expected = {slot: alone(model, slot, frames) for slot in range(4)}
    engine = engine_of(model, 4, 2.2, reserve_s=0.5)
    pool = engine.cache.pool
    assert pool is not None
    callers = Talkers(engine)
    ticks, silent, worst = 0, 0, 0
    for slot in range(4):
        callers.open(slot)
        while slot not in callers.live:
            callers.tick()
    while any(len(heard) < frames for heard in callers.heard.values()):
        served = {slot: len(heard) for slot, heard in callers.heard.items()}
        callers.tick()
        ticks += 1
        assert ticks < 40 * frames, "somebody waits for ever"
        silent = 0 if any(len(callers.heard[slot]) > count for slot, count in served.items()) else silent + 1
        worst = max(worst, silent)
        for slot, heard in callers.heard.items():
            if len(heard) == frames and slot in callers.live:  # has hung up
                engine.close(slot)
                callers.live.discard(slot)
    keeper = engine._pages
    assert keeper is not None
    assert keeper.times_parked > 0, "the pool was never short: the test tests nothing"
    assert worst <= 16, "while nobody speaks, a rebuild of at most a window goes on, a tile a step"
    for slot in range(4):
        assert np.array_equal(np.stack(callers.heard[slot]), expected[slot]), slot
    assert pool.free == pool.pages
    assert sorted(engine._rings._free) == list(range(5))


def test_a_conversation_with_a_past_is_never_refused() -> None:
    """A full engine takes a call that was held elsewhere: it waits, is rebuilt when somebody leaves, and goes on."""
    model = small_model(torch.float32)
    expected = alone(model, 2, 330)
    elsewhere = Talkers(engine_of(model, 3, 1.0))
    elsewhere.open(2)
    for _ in range(310):
        if len(elsewhere.heard[2]) < 300:
            elsewhere.tick()
    rows, first_row = np.stack(elsewhere.rows[2]), elsewhere.first_row[2]
    past = Past(rows[first_row:], first_row, elsewhere.pending[2])

    engine = engine_of(model, 5, 3.0, reserve_s=2.0)  # six rings' worth of five pages: ten for four callers
    callers, keeper = Talkers(engine), engine._pages
    assert keeper is not None
    for slot in (0, 1, 3, 4):
        callers.open(slot)
        callers.tick()
    for _ in range(250):
        if not keeper.report().pressure:
            callers.tick()
    assert not keeper.parked
    with pytest.raises(OutOfPages, match="need what is left"):
        engine.open(2, prompt_of(32, 2), Sampling(), 2)
    engine.open(2, prompt_of(32, 2), Sampling(), 2, past=past)
    callers.heard[2], callers.rows[2] = list(expected[:300]), []
    told = engine.pressure
    assert told is not None
    assert told.parked == (2,)
    assert told.room == 0
    assert told.pressure == MIGRATE_ONE
    assert told.migrate[0] == 2, "who waits is the first to be moved"
    callers.tick()
    for slot in (0, 1):
        callers.live.discard(slot)
        engine.close(slot)
    for _ in range(200):
        if len(callers.heard[2]) < 330:
            callers.tick()
    assert np.array_equal(np.stack(callers.heard[2]), expected)

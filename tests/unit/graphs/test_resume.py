"""Rebuilt from its journal a conversation goes on bit for bit, wherever it was cut and whoever else is there."""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.anchors import AnchorPolicy
from graphs.prefill_budget import PrefillBudget
from graphs.prefix_cache import PrefixCache
from graphs.slot_engine import SlotEngine
from graphs.stages import Past, Sampling
from models.lm import LanguageModel
from tests.golden import NOBODY, golden_lm, golden_prompt, prefill, random_user, talk
from tests.unit.graphs.diary import Chunks, Diary

CALM = Sampling()


def journaled(engine: SlotEngine, slot: int, user: np.ndarray, diary: Diary) -> np.ndarray:
    return np.stack([diary.note(engine.step([slot], user[i : i + 1])) for i in range(len(user))])


def resume(engine: SlotEngine, slot: int, past: Past, seed: int, sampling: Sampling = CALM) -> None:
    engine.open(slot, golden_prompt(), sampling, seed, past=past)
    while slot not in engine.step([], NOBODY).ready:
        pass


@functools.cache
def golden_in(dtype: torch.dtype) -> LanguageModel:
    model = LanguageModel(golden_lm().config, dtype=dtype)
    model.load_state_dict(golden_lm().state_dict())
    return model


@pytest.mark.parametrize("backend", ["torch", "auto", "static", "static-fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=4, deadline=None)
@given(cut=st.integers(0, 140), chunk=st.integers(1, 64), seed=st.integers(0, 2**62))
def test_a_conversation_goes_on_where_it_was_cut(
    dtype: torch.dtype, backend: str, cut: int, chunk: int, seed: int
) -> None:
    """Random cuts of a call whose window (39 frames) slides from frame 8 on and whose ring wraps."""
    model = golden_in(dtype)
    user = random_user(cut + 10, seed % 1000)
    engine, diary = SlotEngine(model, 1, backend=backend), Diary()
    prefill(engine, 0, golden_prompt(), CALM, seed)
    if cut:
        journaled(engine, 0, user[:cut], diary)
    past = diary.past()
    expected = talk(engine, 0, user[cut:])
    other = SlotEngine(model, 3, backend=backend, budget=Chunks(chunk))
    resume(other, 1, past, seed)
    assert np.array_equal(talk(other, 1, user[cut:]), expected)


@settings(max_examples=4, deadline=None)
@given(cut=st.integers(1, 60))
def test_the_pending_column_can_be_drawn_again(cut: int) -> None:
    user = random_user(cut + 10, cut)
    engine, diary = SlotEngine(golden_lm(), 1), Diary()
    prefill(engine, 0, golden_prompt(), CALM, 5)
    journaled(engine, 0, user[:cut], diary)
    past = Past(diary.past().rows, 0, None, user[cut - 1])
    expected = talk(engine, 0, user[cut:])
    other = SlotEngine(golden_lm(), 2, tile=16)
    resume(other, 0, past, 5)
    assert np.array_equal(talk(other, 0, user[cut:]), expected)


@settings(max_examples=5, deadline=None)
@given(st.randoms(use_true_random=False))
def test_resumed_beside_others_under_any_budget(dice: random.Random) -> None:
    """Two journals and a prompt are prefilled while two others talk, a random number of rows a step."""

    class AnyBudget(PrefillBudget):
        def rows(self, live: int, *, anybody_live: bool = True, left_ms: float | None = None) -> int:
            return dice.randrange(1, 30)

    model, user = golden_lm(), random_user(90, 8)
    alone = SlotEngine(model, 1)
    diary = Diary()
    prefill(alone, 0, golden_prompt(), CALM, 99)
    journaled(alone, 0, user[:75], diary)
    expected = talk(alone, 0, user[75:])

    crowd = SlotEngine(model, 5, budget=AnyBudget(64))
    prefill(crowd, 0, golden_prompt(), CALM, 1)
    prefill(crowd, 4, golden_prompt(), CALM, 2)
    crowd.open(2, golden_prompt(), CALM, 99, past=diary.past())
    crowd.open(1, golden_prompt(), CALM, 99, past=diary.past())
    crowd.open(3, golden_prompt(), CALM, 3)
    live: list[int] = []
    heard: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for tick in range(200):
        others = [slot for slot in (0, 4) if dice.random() < 0.8]
        mine = [slot for slot in (1, 2) if slot in live and len(heard[slot]) < 15 and dice.random() < 0.8]
        codes = [random_user(1, tick)[0] for _ in others] + [user[75 + len(heard[slot])] for slot in mine]
        out = crowd.step([*others, *mine], np.stack(codes) if codes else NOBODY)
        live.extend(out.ready)
        for i, slot in enumerate(mine, start=len(others)):
            heard[slot].append(out.tokens[i])
        if all(len(frames) == 15 for frames in heard.values()):
            break
    for slot in (1, 2):
        assert np.array_equal(np.stack(heard[slot]), expected)


def test_a_past_that_cannot_have_been_is_refused() -> None:
    engine, rows = SlotEngine(golden_lm(), 1), np.zeros((3, 17), dtype=np.int16)
    column = np.zeros(17, dtype=np.int16)
    for past, why in (
        (Past(rows[:, :16], 0, column), "rows are"),
        (Past(rows, 0, None), "needs the user's codes"),
        (Past(rows[:0], 7, column), "has rows from there on"),
        (Past(rows - 3, 0, column), "tokens that this model does not know"),
        (Past(rows + 3000, 0, column), "tokens that this model does not know"),
        (Past(rows, 0, column - 2), "lacks tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.open(0, golden_prompt(), CALM, 0, past=past)
    prefill(engine, 0, golden_prompt())  # nothing of it is left


# ---- anchors ---------------------------------------------------------------------------------------------------


def test_anchors_do_not_depend_on_company_or_spares() -> None:
    """Each of four calls that anchor over and over speaks as it does alone, with one spare ring, none or many."""
    model = small_context()
    user = [random_user(60, 30 + slot) for slot in range(4)]
    policy = AnchorPolicy(every=12, lead=6)
    alone = []
    for slot in range(4):
        engine = SlotEngine(model, 1, anchors=policy)
        prefill(engine, 0, golden_prompt(), CALM, slot)
        alone.append(talk(engine, 0, user[slot]))
        assert engine.anchors_done >= 2
        assert engine.anchors_late == 0
    for spares in (0, 1, 4):
        crowd = SlotEngine(model, 4, anchors=policy, spares=spares)
        for slot in range(4):
            crowd.open(slot, golden_prompt(), CALM, slot)
        while len({s for s, t in crowd._open.items() if t.live}) < 4:
            crowd.step([], NOBODY)
        frames = [crowd.step(range(4), np.stack([user[s][i] for s in range(4)])).tokens for i in range(60)]
        for slot in range(4):
            assert np.array_equal(np.stack([frame[slot] for frame in frames]), alone[slot]), (spares, slot)
        assert crowd.anchors_late == 0 or spares < 4
        assert crowd.anchors_late > 0 or spares > 0
        for slot in range(4):
            crowd.close(slot)
        assert sorted(crowd._rings._free) == list(range(4 + spares))


def small_context() -> LanguageModel:
    """The golden model with room for the prompt and an anchor every dozen frames."""
    golden = golden_lm()
    model = LanguageModel(dataclasses.replace(golden.config, context=64))
    model.load_state_dict(golden.state_dict())
    return model


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 90), prefixes=st.booleans())
def test_resumed_between_anchors(cut: int, prefixes: bool) -> None:
    """Cut at any frame, before, at and after anchors and while one is being prepared."""
    model, policy, user = small_context(), AnchorPolicy(every=12, lead=6), random_user(cut + 30, 4)
    engine, diary = SlotEngine(model, 1, anchors=policy), Diary()
    prefill(engine, 0, golden_prompt(), CALM, 7)
    journaled(engine, 0, user[:cut], diary)
    past = diary.past()
    expected = talk(engine, 0, user[cut:])
    other = SlotEngine(model, 2, tile=8, anchors=policy, prefixes=PrefixCache() if prefixes else None)
    prefill(other, 0, golden_prompt(), CALM, 1)
    resume(other, 1, past, 7)
    assert np.array_equal(talk(other, 1, user[cut:]), expected)
    again = SlotEngine(model, 2, tile=8, anchors=policy)
    resume(again, 1, Past(past.rows, past.first_row, None, user[cut - 1]), 7)
    assert np.array_equal(talk(again, 1, user[cut:]), expected)

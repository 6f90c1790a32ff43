"""Anchors: when they come, and what a call of half an hour has in its window because of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphs.anchors import MIN_PERIOD, AnchorPolicy
from graphs.kv_cache import Span
from graphs.slot_engine import SlotEngine, StepOut
from graphs.stages import Past, Sampling
from models.config import AUDIO_CODEBOOKS, FRAMES_PER_S, LMConfig
from models.lm import LanguageModel
from models.prompt import Prompt, build_prompt
from tests.golden import NOBODY, CodesVoice

TINY = LMConfig(
    dim=32,
    text_card=64,
    dep_q=AUDIO_CODEBOOKS,
    card=32,
    num_heads=2,
    num_layers=2,
    context=3000,  # the published one
    depformer_dim=16,
    depformer_dim_feedforward=64,
    depformer_num_heads=2,
    depformer_num_layers=1,
)
SEED = 20_26


@given(
    window=st.integers(1, 4000), prompt=st.integers(1, 4000), seed=st.integers(0, 2**63 - 1), every=st.integers(8, 3000)
)
def test_a_plan_keeps_every_position_inside_the_window(window: int, prompt: int, seed: int, every: int) -> None:
    plan = AnchorPolicy(every).plan(window, prompt, seed)
    if plan is None:
        assert window - prompt < 2 * MIN_PERIOD
        return
    assert plan.period <= every
    anchor = plan.next(0)
    assert prompt + anchor <= window
    for _ in range(5):
        first_row = plan.first_row(anchor)
        assert 0 < first_row < anchor, "what is kept has been said"
        following = plan.next(first_row)
        assert following == anchor + plan.period
        assert prompt + following - first_row <= window, "the ring is full at most when the next anchor comes"
        anchor = following


def test_seeds_spread_the_first_anchors() -> None:
    """Calls that begin together must not all need a spare ring at once."""
    firsts = []
    for seed in range(32):
        plan = AnchorPolicy().plan(2999, 200, seed)
        assert plan is not None
        firsts.append(plan.first)
    assert max(firsts) - min(firsts) > 600
    assert min(np.diff(np.sort(firsts))) >= 10


def test_no_anchors_for_no_seconds() -> None:
    assert AnchorPolicy.of_seconds(0) is None
    assert AnchorPolicy.of_seconds(120) == AnchorPolicy(1500)


def tiny_model() -> LanguageModel:
    model, generator = LanguageModel(TINY), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def persona(role: int) -> Prompt:
    """A voice of 60 frames and a role of 128 tokens: 200 frames together."""
    dice = np.random.default_rng(role)
    codes = torch.from_numpy(dice.integers(0, TINY.card, (60, 8)))
    constant = (1,) * AUDIO_CODEBOOKS
    tokens = dice.integers(4, TINY.text_card, 128).tolist()
    return build_prompt(TINY, CodesVoice(codes), tokens, silence_codes=constant, sine_codes=constant)


class Watched(SlotEngine):
    """Notes the largest position that any row has had."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.largest = 0
        run = self.frame_step.run

        def watched(rows: np.ndarray, spans: Sequence[Span], *rest: Any) -> np.ndarray:
            self.largest = max(self.largest, *(span.last for span in spans))
            return run(rows, spans, *rest)

        self.frame_step.run = watched  # type: ignore[method-assign] # the point of it


def ready(engine: SlotEngine, slot: int, prompt: Prompt, past: Past | None = None) -> None:
    engine.open(slot, prompt, Sampling(), SEED, past=past)
    while slot not in engine.step([], NOBODY).ready:
        pass


@pytest.mark.parametrize("minutes", [6, pytest.param(30, marks=pytest.mark.full)])
def test_a_long_call_keeps_its_prompt_and_is_recovered_exactly(minutes: int) -> None:
    """A call of the published context, prompt and anchors; recovery is tried a minute before its end."""
    model, prompt, frames = tiny_model(), persona(1), int(minutes * 60 * FRAMES_PER_S)
    cut = frames - int(60 * FRAMES_PER_S)
    user = np.random.default_rng(4).integers(0, TINY.card, (frames, 8)).astype(np.int16)
    engine = Watched(model, 1, anchors=AnchorPolicy())
    ready(engine, 0, prompt)
    assert prompt.frames == 200
    rows: list[np.ndarray] = []
    said: list[np.ndarray] = []
    past, first_row = None, 0
    for frame in range(frames):
        out: StepOut = engine.step([0], user[frame : frame + 1])
        rows.append(out.journal[0])
        said.append(out.tokens[0])
        del rows[: int(out.first_rows[0]) - first_row]
        first_row = int(out.first_rows[0])
        if frame == cut - 1:
            past = Past(np.stack(rows), first_row, out.next_columns[0])
    assert past is not None
    plan = AnchorPolicy().plan(TINY.window, prompt.frames, SEED)
    assert plan is not None
    assert engine.anchors_done == 1 + (frames - 1 - plan.first) // 1500
    assert engine.anchors_late == 0

    # Positions: none beyond what the model was trained on; so nothing has ever slid out of the window.
    assert engine.largest < TINY.window
    # Persona: the prompt's keys and values are there, bit for bit, and the newest row sees them.
    fresh = SlotEngine(model, 1)
    ready(fresh, 0, prompt)
    ring = engine._open[0].fill
    assert ring.filled <= TINY.window
    here, there = engine.cache.read(ring.ring, prompt.frames), fresh.cache.read(0, prompt.frames)
    assert torch.equal(here.keys, there.keys)
    assert torch.equal(here.values, there.values)

    # Recovery: bounded, and the same tokens.
    assert len(past.rows) + prompt.frames <= TINY.window
    other = Watched(model, 2, anchors=AnchorPolicy())
    ready(other, 1, prompt, past)
    again = [other.step([1], user[frame : frame + 1]).tokens[0] for frame in range(cut, cut + 100)]
    assert np.array_equal(np.stack(again), np.stack(said[cut : cut + 100]))
    assert other.largest < TINY.window


def test_without_anchors_the_prompt_slides_out() -> None:
    """What anchors are for: the same call, its window slid past the prompt, does not hear who it is any more."""
    model, user = tiny_model(), np.random.default_rng(5).integers(0, TINY.card, (600, 8)).astype(np.int16)
    small = LanguageModel(dataclasses.replace(TINY, context=128 + 100))
    small.load_state_dict(model.state_dict())

    def last_logits(policy: AnchorPolicy | None, role: int) -> torch.Tensor:
        """Text logits after 600 given frames, the same ones whatever the prompt."""
        engine = SlotEngine(small, 1, anchors=policy)
        ready(engine, 0, persona(role))
        heard: list[torch.Tensor] = []
        engine.frame_step.probe = lambda text, _: heard.append(text[0])
        for frame in user:
            engine._open[0].pending = np.concatenate([np.full(9, 5), engine._open[0].pending[9:]]).astype(np.int16)
            engine.step([0], frame[None])
        return heard[-1]

    slid = (last_logits(None, 1) - last_logits(None, 2)).abs().max()
    kept = (last_logits(AnchorPolicy(), 1) - last_logits(AnchorPolicy(), 2)).abs().max()
    assert slid == 0.0, "two layers of a window of 227 look back no further than 454 frames"
    assert kept > 0.01

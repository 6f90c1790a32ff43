"""The engine over slots: the golden run, in any company; prompts beside live frames; the published voice form."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.kv_cache import Span
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES
from models.lm import LanguageModel
from models.prompt import build_prompt
from tests.golden import (
    GREEDY,
    NOBODY,
    CodesVoice,
    PublishedVoice,
    golden_lm,
    golden_prompt,
    golden_run,
    golden_user,
    prefill,
    random_user,
    talk,
)

LOGITS_TOLERANCE = 2e-5


def test_golden_run() -> None:
    """100 frames over a context of 40: the ring wraps, tokens and logits stay."""
    engine = SlotEngine(golden_lm(), 1)
    text: list[Tensor] = []
    audio: list[Tensor] = []
    engine.frame_step.probe = lambda t, a: (text.append(t[0]), audio.append(a[0]))[0]
    prefill(engine, 0, golden_prompt())
    frames = talk(engine, 0, golden_user())
    expected = golden_run()["expected_tokens"].numpy()
    # The published code answers one call later: its row t is the frame that we give for user frame t - 1.
    assert np.array_equal(frames[:99], expected[1:, :9])
    assert (torch.stack(text[:100]) - golden_run()["expected_text_logits"]).abs().max() < LOGITS_TOLERANCE
    every_tenth = torch.stack(audio[:100:10])
    assert (every_tenth - golden_run()["expected_audio_logits_every_10"]).abs().max() < LOGITS_TOLERANCE


@settings(max_examples=6, deadline=None)
@given(st.randoms(use_true_random=False))
def test_tokens_do_not_depend_on_company(dice: random.Random) -> None:
    """One conversation at default temperatures among four that join, speak, fall silent and leave at random."""
    user, seed, sampling = random_user(30, 5), 1234, Sampling()
    alone = SlotEngine(golden_lm(), 1)
    prefill(alone, 0, golden_prompt(), sampling, seed)
    expected = talk(alone, 0, user)

    crowd, mine = SlotEngine(golden_lm(), 5), 3
    opened: set[int] = set()
    live: set[int] = set()
    heard: list[np.ndarray] = []
    for tick in range(60):
        for slot in (0, 1, 2, 4):
            if slot not in opened and dice.random() < 0.2:
                crowd.open(slot, golden_prompt(), Sampling(1.0, 20, 1.5, 30), tick)
                opened.add(slot)
            elif dice.random() < 0.1:
                crowd.close(slot)
                opened.discard(slot)
                live.discard(slot)
        if tick == 3:
            crowd.open(mine, golden_prompt(), sampling, seed)
            opened.add(mine)
        speakers = [slot for slot in sorted(live) if dice.random() < 0.7]
        codes = [user[len(heard)] if slot == mine else random_user(1, tick * 7 + slot)[0] for slot in speakers]
        out = crowd.step(speakers, np.stack(codes) if codes else NOBODY)
        live.update(out.ready)
        if mine in speakers:
            heard.append(out.tokens[speakers.index(mine)])
        if len(heard) == len(user):
            break
    assert len(heard) > 10
    assert np.array_equal(np.stack(heard), expected[: len(heard)])


def test_a_long_prompt_does_not_starve_live_frames() -> None:
    """A live slot gets its frame in every step while another's prompt takes several tiles."""
    engine = SlotEngine(golden_lm(), 2, tile=8)
    prefill(engine, 0, golden_prompt())
    engine.open(1, golden_prompt(), GREEDY, 1)
    steps = 0
    while True:
        out = engine.step([0], random_user(1, steps))
        steps += 1
        assert out.tokens.shape == (1, 9)
        if out.ready:
            break
    assert out.ready == (1,)
    assert steps == golden_prompt().frames // 8


def test_journal_rows_rebuild_the_same_cache() -> None:
    """Feeding prompt and journal to another slot as one prompt gives the same next frames, bit for bit."""
    user = random_user(60, 9)
    engine = SlotEngine(golden_lm(), 2, tile=128)
    prefill(engine, 0, golden_prompt(), Sampling(), 77)
    rows = [engine.step([0], user[i : i + 1]).journal[0] for i in range(50)]
    snapshot = engine.cache.snapshot(0)

    columns = np.concatenate((golden_prompt().columns, np.stack(rows)))
    other = SlotEngine(golden_lm(), 2, tile=128)
    other.cache.keys.zero_()
    spans = [columns[i : i + 17] for i in range(0, len(columns), 17)]
    first = 0
    for chunk in spans:
        other.frame_step.run(chunk, [Span(0, len(chunk), 1, first)], [])
        first += len(chunk)
    rebuilt = other.cache.snapshot(1)
    assert first < other.cache.capacity  # nothing of the rings was overwritten: they are equal as a whole
    assert torch.equal(rebuilt["keys"], snapshot["keys"])
    assert torch.equal(rebuilt["values"], snapshot["values"])


def test_published_voice_form_equals_its_codes() -> None:
    """`.pt` voices carry embeddings of all columns but the last, and a ring of four token columns after them."""
    model, codes = golden_lm(), golden_run()["voice_prompt_codes"]
    common = {"silence_codes": PUBLISHED_SILENCE_CODES, "sine_codes": PUBLISHED_SINE_CODES}
    from_codes = build_prompt(model.config, CodesVoice(codes), [5, 6, 7], **common)
    frames = len(codes)
    count = frames - 1  # the published code saves none for its first call
    columns = torch.from_numpy(from_codes.columns.astype(np.int64))
    cache = torch.full((17, 4), -2)
    cache[:, count % 4] = columns[count]
    delayed = torch.tensor([delay > 0 for delay in model.config.delays])
    cache[delayed, (count + 1) % 4] = columns[count + 1][delayed]
    voice = PublishedVoice(model.embed(columns[:count]).detach(), cache)
    published = build_prompt(model.config, voice, [5, 6, 7], **common)

    assert np.array_equal(published.columns[count:], from_codes.columns[count:])
    assert np.array_equal(published.given, from_codes.given)
    user = random_user(20, 3)
    engine = SlotEngine(model, 2, tile=8)
    prefill(engine, 0, from_codes)
    prefill(engine, 1, published)
    assert np.array_equal(talk(engine, 0, user), talk(engine, 1, user))


def test_no_input_token_contributes_nothing() -> None:
    model = golden_lm()
    tokens = torch.randint(0, 90, (1, 17), generator=torch.Generator().manual_seed(1))
    silent = tokens.clone()
    silent[0, 9:] = -1
    agent_only = model.text_emb.weight[tokens[0, 0]] + sum(model.emb[k].weight[tokens[0, 1 + k]] for k in range(8))
    torch.testing.assert_close(model.embed(silent)[0], agent_only, atol=1e-6, rtol=0)


def test_misuse_is_refused_and_changes_nothing() -> None:
    engine = SlotEngine(golden_lm(), 1)
    with pytest.raises(ValueError, match="slot 1 does not exist"):
        engine.open(1, golden_prompt(), GREEDY, 0)
    with pytest.raises(ValueError, match="wait until it is reported ready"):
        engine.step([0], random_user(1, 0))
    engine.open(0, golden_prompt(), GREEDY, 0)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        engine.open(0, golden_prompt(), GREEDY, 0)
    with pytest.raises(ValueError, match="wait until it is reported ready"):
        engine.step([0], random_user(1, 0))
    long_role = build_prompt(
        golden_lm().config,
        CodesVoice(golden_run()["voice_prompt_codes"]),
        [5] * 60,
        silence_codes=PUBLISHED_SILENCE_CODES,
        sine_codes=PUBLISHED_SINE_CODES,
    )
    engine.close(0)
    with pytest.raises(ValueError, match="shorten the role"):
        engine.open(0, long_role, GREEDY, 0)
    prefill(engine, 0, golden_prompt())
    assert np.array_equal(talk(engine, 0, golden_user())[:99], golden_run()["expected_tokens"].numpy()[1:, :9])


def test_embedding_agrees_with_training_and_follows_moved_weights() -> None:
    model = LanguageModel(golden_lm().config)
    model.load_state_dict(golden_lm().state_dict())
    tokens = torch.randint(-1, 90, (8, 17), generator=torch.Generator().manual_seed(2))
    served = model.eval().embed(tokens)
    torch.testing.assert_close(model.train().embed(tokens), served, atol=1e-6, rtol=0)
    with torch.no_grad():
        model.text_emb.weight.data = model.text_emb.weight.data.clone() + 1.0
    moved = model.eval().embed(tokens)
    torch.testing.assert_close(moved, served + (tokens[:, :1] >= 0), atol=1e-5, rtol=0)

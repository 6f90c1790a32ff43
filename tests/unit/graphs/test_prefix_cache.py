"""Beginnings of prompts that are kept: the same tokens with and without, no more bytes than allowed, nobody else's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from graphs.prefix_cache import PrefixCache, PrefixOwners, prefix_keys
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES
from models.prompt import Prompt, build_prompt
from tests.golden import NOBODY, CodesVoice, PublishedVoice, golden_lm, golden_run, random_user, talk

CALM = Sampling()
ALICE, BOB = PrefixOwners(role="alice"), PrefixOwners(role="bob")


def prompt_of(*role: int, voice: int = 0) -> Prompt:
    codes = torch.roll(golden_run()["voice_prompt_codes"], voice, 0)
    return build_prompt(
        golden_lm().config,
        CodesVoice(codes),
        role,
        silence_codes=PUBLISHED_SILENCE_CODES,
        sine_codes=PUBLISHED_SINE_CODES,
    )


def published_prompt(digest: str, scale: float) -> Prompt:
    dice = torch.Generator().manual_seed(0)
    embeddings = torch.randn(8, golden_lm().config.dim, generator=dice) * scale
    voice = PublishedVoice(embeddings, torch.ones(17, 4, dtype=torch.int64), digest=digest)
    return build_prompt(
        golden_lm().config, voice, [5], silence_codes=PUBLISHED_SILENCE_CODES, sine_codes=PUBLISHED_SINE_CODES
    )


def opened(engine: SlotEngine, slot: int, prompt: Prompt, owners: PrefixOwners, seed: int = 1) -> int:
    """Opens a slot until it is ready; returns how many rows that took."""
    rows = 0
    run = engine.frame_step.run

    def counting(columns: np.ndarray, *rest: object) -> np.ndarray:
        nonlocal rows
        rows += len(columns)
        return run(columns, *rest)  # type: ignore[arg-type] # passed on as they came

    engine.frame_step.run = counting  # type: ignore[method-assign] # put back below
    engine.open(slot, prompt, CALM, seed, owners=owners)
    while slot not in engine.step([], NOBODY).ready:
        pass
    engine.frame_step.run = run  # type: ignore[method-assign] # as it was
    return rows


@pytest.mark.parametrize("backend", ["torch", "auto", "static-fp8"])
def test_tokens_are_the_same_with_a_snapshot_and_without(backend: str) -> None:
    user, prompt = random_user(30, 1), prompt_of(5, 6, 7)
    plain = SlotEngine(golden_lm(), 1, backend=backend)
    opened(plain, 0, prompt, ALICE)
    expected = talk(plain, 0, user)

    engine = SlotEngine(golden_lm(), 3, backend=backend, tile=8, prefixes=PrefixCache())
    assert opened(engine, 0, prompt, ALICE, seed=9) == prompt.frames
    talk(engine, 0, random_user(60, 2))  # its ring wraps: what was kept is a copy
    assert opened(engine, 1, prompt, ALICE) == 1, "the last column is run for what is drawn after it"
    assert np.array_equal(talk(engine, 1, user), expected)
    other = prompt_of(9, 8)
    assert opened(engine, 2, other, ALICE) == other.frames - other.voice_frames
    alone = SlotEngine(golden_lm(), 1, backend=backend)
    opened(alone, 0, other, ALICE)
    assert np.array_equal(talk(engine, 2, user), talk(alone, 0, user))


def test_a_role_is_fast_for_its_tenant_alone() -> None:
    prompt = prompt_of(5, 6, 7)
    after_voice = prompt.frames - prompt.voice_frames
    for owners, expected in ((ALICE, 1), (BOB, after_voice), (PrefixOwners(), after_voice)):
        engine = SlotEngine(golden_lm(), 2, prefixes=PrefixCache())
        opened(engine, 0, prompt, ALICE)
        assert opened(engine, 1, prompt, owners) == expected
    engine = SlotEngine(golden_lm(), 2, prefixes=PrefixCache())
    opened(engine, 0, prompt, PrefixOwners())  # from nobody in particular: not kept for anybody
    assert opened(engine, 1, prompt, PrefixOwners()) == after_voice


def test_a_tenants_own_voice_is_fast_for_that_tenant_alone() -> None:
    mine, theirs = PrefixOwners("alice", "alice"), PrefixOwners("bob", "bob")
    prompt, cache = prompt_of(5), PrefixCache()
    engine = SlotEngine(golden_lm(), 3, prefixes=cache)
    opened(engine, 0, prompt, mine)
    assert opened(engine, 1, prompt, theirs) == prompt.frames
    cache.forget("alice")
    assert opened(engine, 2, prompt, mine) == prompt.frames
    cache.forget("alice")
    cache.forget("bob")
    assert (len(cache), cache.bytes) == (0, 0)


def test_the_oldest_go_first_and_the_limit_holds() -> None:
    engine = SlotEngine(golden_lm(), 1)
    frames = prompt_of(5).voice_frames
    limit = engine.cache.bytes_of(frames) * 2
    cache = PrefixCache(limit)
    engine = SlotEngine(golden_lm(), 1, prefixes=cache)
    rows = []
    for voice in (0, 1, 0, 2, 0, 1):  # room for two voices: when 2 comes, 1 has to go
        prompt = prompt_of(5, voice=voice)
        rows.append(opened(engine, 0, prompt, PrefixOwners()))
        engine.close(0)
        assert cache.bytes <= limit
    rest = prompt_of(5).frames - frames
    assert rows == [rest + frames, rest + frames, rest, rest + frames, rest, rest + frames]
    assert len(cache) == 2
    nothing = SlotEngine(golden_lm(), 1, prefixes=PrefixCache(0))
    opened(nothing, 0, prompt_of(5), ALICE)
    assert len(nothing._rings._prefixes) == 0


def test_a_snapshot_holds_the_used_part_alone() -> None:
    for backend in ("torch", "auto"):
        engine = SlotEngine(golden_lm(), 1, backend=backend)
        part = engine.cache.read(0, 10)
        assert part.bytes == engine.cache.bytes_of(10) == engine.cache.bytes_per_slot * 10 // engine.cache.capacity
        assert part.keys.untyped_storage().nbytes() == part.keys.numel() * part.keys.element_size()
    with pytest.raises(ValueError, match="no first"):
        engine.cache.read(0, engine.cache.capacity + 1)


def test_embeddings_are_told_apart_by_their_voice() -> None:
    """Their columns are placeholders, equal for all voices of one length."""
    one, two = published_prompt("one", 1.0), published_prompt("two", 2.0)
    assert np.array_equal(one.columns, two.columns)
    assert not set(prefix_keys(one, ALICE)) & set(prefix_keys(two, ALICE))
    engine = SlotEngine(golden_lm(), 2, prefixes=PrefixCache(), tile=4)
    opened(engine, 0, one, ALICE)
    assert opened(engine, 1, two, ALICE) == two.frames
    engine.close(1)
    assert opened(engine, 1, one, BOB) == one.frames - one.voice_frames
    user = random_user(10, 3)
    plain = SlotEngine(golden_lm(), 1)
    opened(plain, 0, one, ALICE)
    assert np.array_equal(talk(engine, 1, user), talk(plain, 0, user))


def test_any_role_leaves_the_voices_part_as_it_is() -> None:
    bare = prompt_of()
    for role in ((), (5,), (5, 6, 7, 8)):
        prompt = prompt_of(*role)
        assert prompt.voice_frames == bare.voice_frames
        assert np.array_equal(prompt.columns[: prompt.voice_frames], bare.columns[: bare.voice_frames])
    assert dataclasses.replace(bare, voice_frames=0, voice_digest="").frames == bare.frames
    assert prefix_keys(dataclasses.replace(bare, voice_frames=0), PrefixOwners()) == []

"""An engine stage built as an operator chose: kernels, KV dtype, overcommit; and what its numerics_id says of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actors.stage_build import build_engine
from actors.stage_config import StageConfig
from graphs.kv_pressure import RESERVE_S
from graphs.sampling import HAS_NUMBA
from graphs.stages import FrameKey, SessionSpec, StageBatch, Verdict
from models.checkpoint import load_checkpoint
from serving.settings import ServeSettings
from tests.stage_fakes import NO_FRAMES

RANDOM = "demo-random"  # it babbles: two conversations soon differ


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def first_words(config: StageConfig) -> tuple[str, np.ndarray]:
    """numerics_id, and ten frames of one conversation among the engine's slots."""
    voice = load_checkpoint(RANDOM, parts=frozenset()).voices.names()[0]
    stage, description = build_engine(config)
    stage.open("a", 1, 1, SessionSpec(voice, "", 3))
    while not stage.step(NO_FRAMES).ready:
        pass
    said, reports = [], 0
    for frame in range(10):
        reply = stage.step(StageBatch((FrameKey("a", 1, frame),), np.full((1, 8), 7, dtype=np.int16)))
        assert reply.frames.verdicts == (Verdict.DONE,)
        said.append(reply.frames.data[0])
        reports += reply.memory is not None
    assert (reports > 0) == (config.kv_overcommit > 1.0)
    return description.numerics_id, np.stack(said)


@pytest.mark.skipif(not HAS_NUMBA, reason="needs the compiled step: install numba")
def test_overcommit_changes_no_bit_and_other_numbers_say_so() -> None:
    plain, words = first_words(StageConfig(RANDOM, slots=3))
    paged, same = first_words(StageConfig(RANDOM, slots=3, kv_overcommit=1.5))
    assert np.array_equal(words, same)
    assert paged == plain
    other, _ = first_words(StageConfig(RANDOM, slots=3, dtype="float32", kv_dtype="bfloat16"))
    assert other != plain
    assert "kv.bfloat16" in other


def test_what_cannot_be_served_is_refused_before_anything_is_open() -> None:
    with pytest.raises(ValueError, match="in fp8 are for CUDA"):
        build_engine(StageConfig(RANDOM, slots=1, kv_dtype="fp8"))
    with pytest.raises(ValueError, match="no linear backend 'fast'"):
        build_engine(StageConfig(RANDOM, slots=1, linear="fast"))


@pytest.mark.skipif(not HAS_NUMBA, reason="needs the compiled step: install numba")
def test_how_long_calls_must_be_able_to_go_on_is_the_operators() -> None:
    assert StageConfig().kv_reserve_s == RESERVE_S == ServeSettings().kv_reserve_s
    voice = load_checkpoint(RANDOM, parts=frozenset()).voices.names()[0]
    for reserve_s in (4.0, 20.0):
        stage, _ = build_engine(StageConfig(slots=3, kv_overcommit=1.5, kv_reserve_s=reserve_s))
        stage.open("a", 1, 1, SessionSpec(voice, "", 3))
        replies = [stage.step(NO_FRAMES)]
        while not replies[-1].ready:
            replies.append(stage.step(NO_FRAMES))
        left = {reply.memory.seconds_left for reply in replies if reply.memory is not None}
        assert left == {reserve_s}  # there is room: it looks no further ahead

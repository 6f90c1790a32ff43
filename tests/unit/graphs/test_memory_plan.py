"""Slots from bytes: what an H100 should hold, and that one more would not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphs.anchors import AnchorPolicy
from graphs.backends import Backends, make_cache
from graphs.memory_plan import GIB, MOST_SLOTS, MemoryPlan, memory_plan
from models.config import LMConfig, MimiConfig
from models.lm import LanguageModel
from tests.unit.graphs.small import SMALL

ANCHORS = AnchorPolicy()


@given(
    memory=st.integers(1, 200),
    weights=st.integers(1, 40),
    context=st.floats(0.01, 3),
    overcommit=st.floats(1, 3),
    anchored=st.booleans(),
)
def test_as_many_as_fit_and_not_one_more(
    memory: int, weights: int, context: float, overcommit: float, anchored: bool
) -> None:
    parts = MemoryPlan(weights * GIB, int(context * GIB), 16 << 20)
    anchors = ANCHORS if anchored else None
    if parts.needed(1, anchors, overcommit) > memory * GIB:
        with pytest.raises(ValueError, match="take a larger device"):
            parts.slots(memory * GIB, anchors, overcommit)
        return
    slots = parts.slots(memory * GIB, anchors, overcommit)
    assert parts.needed(slots, anchors, overcommit) <= memory * GIB
    assert slots == MOST_SLOTS or parts.needed(slots + 1, anchors, overcommit) > memory * GIB


def test_the_published_shape_on_an_h100() -> None:
    """17 GB of weights, 1.6 GB a context: 32 conversations in bf16 and 72 in fp8 are what it has to hold."""
    bf16 = memory_plan(LMConfig(), MimiConfig(), torch.bfloat16, Backends())
    fp8 = memory_plan(LMConfig(), MimiConfig(), torch.bfloat16, Backends(kv_dtype="fp8"))
    assert 14e9 < bf16.weights < 18e9
    assert bf16.context == 2 * 32 * 4096 * 3072 * 2
    assert fp8.context == pytest.approx(bf16.context / 2, rel=0.02)
    assert bf16.slots(79 * GIB, ANCHORS) >= 32
    assert fp8.slots(79 * GIB, ANCHORS) >= 72
    assert fp8.slots(79 * GIB, ANCHORS, 1.5) > 1.4 * fp8.slots(79 * GIB, ANCHORS)
    with pytest.raises(ValueError, match=r"the device has 16\.0"):
        bf16.slots(16 * GIB, ANCHORS)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_it_counts_what_is_allocated(kv_dtype: str) -> None:
    chosen = Backends(step="static", kv_dtype=kv_dtype)
    cache = make_cache(SMALL, 3, 64, device=torch.device("cpu"), dtype=torch.float32, backend=chosen)
    parts = memory_plan(SMALL, MimiConfig(), torch.float32, chosen, tile=64)
    assert parts.context == cache.bytes_per_slot
    assert parts.weights == sum(p.numel() * p.element_size() for p in LanguageModel(SMALL).parameters())

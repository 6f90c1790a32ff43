"""The search for the most conversations, and one real measurement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capacity import CapacityBench, CapacityRow, most_slots


def row(slots: int, p99_ms: float) -> CapacityRow:
    return CapacityRow(slots, 10, p99_ms / 2, p99_ms, "cpu", "float32")


@given(st.integers(0, 200), st.integers(1, 128))
def test_the_search_finds_the_edge_and_measures_nothing_twice(fits: int, limit: int) -> None:
    rows = most_slots(lambda slots: row(slots, 80.0 if slots <= fits else 80.1), limit)
    assert max((r.slots for r in rows if r.holds), default=0) == min(fits, limit)
    assert len({r.slots for r in rows}) == len(rows)
    assert all(1 <= r.slots <= limit for r in rows)


def test_a_real_frame_is_measured() -> None:
    bench = CapacityBench("demo", torch.device("cpu"), torch.bfloat16, frames=3)
    measured = bench.measure(2)
    assert 0 < measured.p50_ms <= measured.p99_ms
    assert measured.dtype == "bfloat16"


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'9b' is neither"):
        CapacityBench("9b", torch.device("cpu"), torch.float32, frames=3)

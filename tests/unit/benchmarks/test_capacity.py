"""The search for the most conversations, and one real measurement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.capacity import CapacityBench, CapacityRow, main, most_slots
from benchmarks.setting import SHAPES, Setting


def row(slots: int, p99_ms: float) -> CapacityRow:
    return CapacityRow(slots, 10, p99_ms / 2, p99_ms, "cpu", "float32")


@given(st.integers(0, 200), st.integers(1, 128), st.integers(1, 100))
def test_the_search_finds_the_edge_and_measures_nothing_twice(fits: int, limit: int, first: int) -> None:
    rows = most_slots(lambda slots: row(slots, 80.0 if slots <= fits else 80.1), limit, first)
    assert max((r.slots for r in rows if r.holds), default=0) == min(fits, limit)
    assert len({r.slots for r in rows}) == len(rows)
    assert all(1 <= r.slots <= limit for r in rows)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("backend", "kv"), [("auto", "bfloat16"), ("static-fp8", "float8_e4m3fn")])
def test_a_real_frame_is_measured(overlap: bool, backend: str, kv: str) -> None:
    chosen = Setting(torch.device("cpu"), *SHAPES["tiny"])
    bench = CapacityBench(chosen, torch.bfloat16, frames=3, backend=backend, runner="static", overlap=overlap)
    measured = bench.measure(2)
    assert 0 < measured.p50_ms <= measured.p99_ms
    assert (measured.dtype, measured.kv, measured.overlap) == ("bfloat16", kv, overlap)


def test_an_unknown_shape_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shape", "9b", "--device", "cpu"])
    assert "'9b' is neither" in capsys.readouterr().err

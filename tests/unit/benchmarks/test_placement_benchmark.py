"""The placement benchmark: every kind of call, its cluster as asked for, and a clear word where it cannot be."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import placement


async def test_it_measures_every_kind_of_call_and_leaves_the_cluster_as_it_was() -> None:
    bench = placement.Bench(replicas=6, slots=8, sessions=20)
    await bench.fill()
    before = bench.router.replicas()
    assert sum(view.busy for view in before) == 20
    await bench.turn()
    bench.look_at_all(bench.spots())
    assert {"new caller", "release", "move", "every replica looked at"} < set(bench.taken)
    after = bench.router.replicas()
    assert [(view.busy, view.arriving, view.free) for view in after] == [
        (view.busy, view.arriving, view.free) for view in before
    ]


def test_it_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    placement.main(["--replicas", "4", "--slots", "4", "--sessions", "8", "--rounds", "3", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)


def test_more_sessions_than_fit_are_refused_in_words() -> None:
    with pytest.raises(SystemExit, match="give fewer"):
        asyncio.run(placement.measure(replicas=2, slots=4, sessions=4, rounds=1))

"""Parity through the live actors: the golden runs hold there too, and another model does not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file, save_file

from evaluation.golden import read_goldens
from evaluation.parity_live import run_live

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_the_golden_runs_hold_in_the_actors_that_serve() -> None:
    rows = run_live(read_goldens(DATA), "cpu")
    assert [(row.run, row.value) for row in rows if not row.met] == []
    assert [row.value for row in rows][:2] == ["100/100", "480/480"]
    assert len(rows) == 3


def test_another_model_misses_in_the_actors_that_serve(tmp_path: Path) -> None:
    for path in DATA.glob("lm_small*"):
        shutil.copy(path, tmp_path)
    weights = load_file(tmp_path / "lm_small.safetensors")
    weights["transformer.layers.0.self_attn.in_proj_weight"] *= 1.5
    save_file(weights, tmp_path / "lm_small.safetensors")
    (row,) = run_live(read_goldens(tmp_path), "cpu")
    assert not row.met

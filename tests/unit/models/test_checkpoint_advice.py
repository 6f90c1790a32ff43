"""What a checkpoint's config.json advises: how it is sampled, and which roles it plays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint import CheckpointError, load_checkpoint
from models.config import Sampling
from tests.small_checkpoint import config, write_small_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small"))


def test_a_checkpoint_recommends_how_it_is_sampled(small: Path, tmp_path: Path) -> None:
    assert load_checkpoint(small, parts=frozenset()).sampling == Sampling(0.7, 25, 0.8, 250)
    wished = {"text_temperature": 0.4, "audio_top_k": 100}
    (tmp_path / "config.json").write_text(json.dumps(config(sampling=wished)))
    assert load_checkpoint(tmp_path, parts=frozenset()).sampling == Sampling(0.4, 25, 0.8, 100)


@pytest.mark.parametrize(
    ("wished", "said"),
    [
        ({"text_temperature": 10.5}, r"text temperature 10\.5 is not in 0 … 10"),
        ({"audio_temperature": -0.1}, "audio temperature"),
        ({"audio_temperature": float("nan")}, "audio temperature nan"),
        ({"text_top_k": 0}, "text top-k 0 is not in 1 … 512"),
        ({"audio_top_k": 513}, "audio top-k 513"),
        ({"audio_top_k": 2.5}, "audio_top_k must be a whole number"),
        ({"text_temperature": "warm"}, "text_temperature must be a number"),
        ({"text_temperature": True}, "text_temperature must be a number"),
        ({"temperature": 0.4}, "no 'temperature', only text_temperature, text_top_k"),
        ([0.4, 25], "'sampling' must be an object"),
    ],
)
def test_what_no_step_could_draw_with_is_refused_on_load(wished: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(sampling=wished)))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}.*; correct it there"):
        load_checkpoint(tmp_path, parts=frozenset())


def test_a_checkpoint_suggests_roles(small: Path, tmp_path: Path) -> None:
    assert load_checkpoint(small, parts=frozenset()).roles == ()
    (tmp_path / "config.json").write_text(json.dumps(config(roles=[{"name": "Café", "text": "You sell coffee."}])))
    (role,) = load_checkpoint(tmp_path, parts=frozenset()).roles
    assert (role.name, role.text) == ("Café", "You sell coffee.")


@pytest.mark.parametrize(
    "wrong", ["cafe", [{"name": "Café"}], [{"name": "", "text": "You."}], [{"name": "A", "text": 5}], 5]
)
def test_roles_that_nobody_could_choose_are_refused(wrong: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(roles=wrong)))
    with pytest.raises(CheckpointError, match=r"config\.json: 'roles' must be a list of .*text"):
        load_checkpoint(tmp_path, parts=frozenset())

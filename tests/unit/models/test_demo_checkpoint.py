"""The demo model with random weights: the same bytes everywhere, made once; it runs though it cannot speak."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from graphs.engine import ConversationEngine
from graphs.stages import SessionSpec
from loadtest.callers import CALLERS
from models import demo_checkpoint
from models.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.config import TEXT_PAD
from models.demo_checkpoint import (
    MIMI,
    TINY_LM,
    TINY_MIMI,
    VOICES,
    constant_codes,
    ensure_demo_checkpoint,
    write_demo_checkpoint,
)

# Of recipe 1. A change here without a new RECIPE would leave old folders in use on every machine that has one.
WEIGHTS = {
    "model.safetensors": "9d6b72e1c4f1fefff8bb16a84a954e185af738a0c57fd876203775858ba0046a",
    "mimi.safetensors": "d77de4bd0a629705780c369ab2e63ddf76566aec1f1129dbcb3d5fba09f04382",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def demo(home: Path) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONAPLEX_HOME", str(home))
        return load_checkpoint("demo-random")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_made_in_seconds_and_once(tmp_path: Path) -> None:
    started = time.process_time()
    folder = ensure_demo_checkpoint(tmp_path)
    assert time.process_time() - started < 10
    made = (folder / "config.json").stat().st_mtime_ns
    assert ensure_demo_checkpoint(tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_its_weights_are_those_of_the_recipe(demo: Checkpoint) -> None:
    assert {name: digest(demo.folder / name) for name in WEIGHTS} == WEIGHTS


def test_two_makers_give_the_same_bytes(demo: Checkpoint, tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 4 + len(VOICES)
    assert [digest(tmp_path / file) for file in files] == [digest(demo.folder / file) for file in files]


def test_it_says_that_it_cannot_speak(demo: Checkpoint) -> None:
    assert not demo.trained
    assert "untrained" in demo.name


def test_it_has_the_published_voices_each_of_its_own(demo: Checkpoint) -> None:
    assert sorted(demo.voices.names()) == sorted(VOICES)
    assert len(VOICES) == 18
    assert len({demo.voices.load(name).digest for name in VOICES}) == 18
    assert demo.voices.has("NATF2.pt")


def test_its_size_is_the_small_models(demo: Checkpoint) -> None:
    assert demo.lm is not None
    assert 28e6 < sum(tensor.numel() for tensor in demo.lm.parameters()) < 31e6


def test_its_silence_and_sine_are_its_own_codecs(demo: Checkpoint) -> None:
    silence, sine = constant_codes(MIMI, load_file(demo.folder / "mimi.safetensors"))
    assert demo.silence_codes == tuple(silence)
    assert demo.sine_codes == tuple(sine)
    assert silence != sine


def test_a_race_is_won_by_whoever_renames_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ensure_demo_checkpoint(tmp_path / "other")
    final = tmp_path / other.name

    def overtaken(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        other.rename(final)

    monkeypatch.setattr(demo_checkpoint, "write_demo_checkpoint", overtaken)
    assert ensure_demo_checkpoint(tmp_path) == final
    assert json.loads((final / "config.json").read_text())["trained"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([final.name, "other"])


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_checkpoint, "write_demo_checkpoint", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*PERSONAPLEX_HOME"):
        ensure_demo_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="PERSONAPLEX_HOME"):
        ensure_demo_checkpoint(tmp_path / "file")


def test_conversations_run_and_are_heard(demo: Checkpoint) -> None:
    """Four conversations for four seconds: mostly silent in text, moderate in level, never clipped."""
    engine = ConversationEngine(demo, 4)
    for slot in range(4):
        engine.open(slot, SessionSpec(voice=VOICES[slot], role="You are a friendly teacher.", seed=slot))
    ready: set[int] = set()
    while len(ready) < 4:
        ready |= set(engine.step([], np.zeros((0, 8), dtype=np.int16)).ready)
    silence = np.array([demo.silence_codes] * 4, dtype=np.int16)
    tokens = np.stack([engine.step(range(4), silence).tokens for _ in range(50)]).astype(np.int64)
    assert 0.5 < (tokens[:, :, 0] == TEXT_PAD).mean() < 0.98
    assert demo.tokenizer is not None
    words = "".join(demo.tokenizer.piece(int(token)) for token in tokens[:, :, 0].flatten())
    assert words.isprintable()
    assert len(words) > 20
    assert demo.mimi is not None
    with torch.inference_mode():
        pcm = demo.mimi.decode_sequence(torch.from_numpy(tokens[:, :, 1:]).transpose(0, 1))
    assert pcm.abs().max() < 0.9
    loudness = pcm.square().mean(1).sqrt()
    assert bool(((loudness > 0.02) & (loudness < 0.2)).all())


def test_windows_can_be_short(tmp_path: Path) -> None:
    demo_checkpoint.write_short_memory(tmp_path / "short", context=40, codec_context=10)
    short = load_checkpoint(str(tmp_path / "short"))
    assert short.lm_config.context == 40
    assert short.mimi_config.transformer.context == 10
    assert "NATF2" in short.voices.names()


def test_a_tiny_one_weighs_nothing_and_takes_the_roles_of_callers(tmp_path: Path) -> None:
    write_demo_checkpoint(tmp_path, TINY_LM, TINY_MIMI)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 1 << 20
    engine = ConversationEngine(load_checkpoint(str(tmp_path)), 1)
    engine.open(0, SessionSpec(voice=VOICES[0], role=max((caller.role for caller in CALLERS), key=len), seed=0))
    while not engine.step([], np.zeros((0, 8), dtype=np.int16)).ready:
        pass

"""The exported folder: small, loadable, and refused where the parts do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import load_checkpoint
from models.config import Sampling
from models.demo_checkpoint import VOICES, random_lm, random_mimi
from tests.small_checkpoint import LM, MIMI
from training import codec_model, codes, export, lm
from training.average import averaged
from training.script import AGENT_VOICES, VOICE_NAMES
from training.state import save_state


@pytest.fixture(name="state")
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What training leaves, of a small model."""
    monkeypatch.setattr(lm, "CONFIG", LM)
    monkeypatch.setattr(codec_model, "CONFIG", MIMI)
    monkeypatch.setattr(codes, "CONFIG", MIMI)
    save_state(tmp_path / "lm", {f"model.{name}": t.half() for name, t in random_lm(LM).items()}, {"step": 30})
    codec = {f"mimi.{name}": tensor for name, tensor in random_mimi(MIMI).items()}
    last = "mimi.decoder.model.14.conv.conv.bias"
    codec[f"average.{last}"] = codec[last] + 0.5
    save_state(tmp_path / "codec", codec, {"step": 20})
    mimi, _ = codes.load_codec(tmp_path / "codec")
    (tmp_path / "codes").mkdir()
    told = {"codebooks": codec_model.codes_digest(mimi.state_dict())}
    (tmp_path / "codes" / "about.json").write_text(json.dumps(told))
    voices = {"silence": torch.arange(8), "sine": torch.arange(8) + 8, "prompt-00-1": torch.ones(40, 8).to(torch.int16)}
    save_file(voices, tmp_path / "codes" / "voices.safetensors")
    save_file({"voices": torch.zeros(3, dtype=torch.long)}, tmp_path / "codes" / "train-first-000.safetensors")
    return tmp_path


def run(state: Path) -> dict[str, float]:
    return export.export(state / "lm", state / "codec", state / "codes", state / "out")


def test_what_is_exported_loads_as_what_was_trained(state: Path) -> None:
    told = run(state)
    assert (told["codec_step"], told["lm_step"]) == (20, 30)
    stored = load_file(state / "out" / "model.safetensors")
    assert stored["text_emb.weight"].dtype == torch.int8
    assert load_file(state / "out" / "mimi.safetensors")["upsample.convtr.convtr.convtr.weight"].dtype == torch.float16
    loaded = load_checkpoint(state / "out")
    assert loaded.lm is not None
    assert loaded.mimi is not None
    trained = random_lm(LM)
    for name, tensor in loaded.lm.state_dict().items():
        step = trained[name].abs().flatten(1).amax(1) / 127 if trained[name].dim() == 2 else torch.zeros(1)
        off = (tensor - trained[name]).abs().flatten(1).amax(1)
        assert bool((off <= 0.501 * step + 2**-11 * trained[name].abs().max()).all()), name
    shipped = averaged({f"mimi.{name}": tensor for name, tensor in random_mimi(MIMI).items()})
    bias = "decoder.model.14.conv.conv.bias"
    assert torch.equal(loaded.mimi.state_dict()[bias], (shipped[f"mimi.{bias}"] + 0.5).half().float())
    assert loaded.silence_codes == tuple(range(8))
    assert sorted(loaded.voices.names()) == sorted(VOICES)
    assert loaded.trained


def test_it_says_how_it_wants_to_be_sampled(state: Path) -> None:
    run(state)
    assert load_checkpoint(state / "out", parts=frozenset()).sampling == Sampling(0.6, 25, 0.3, 250)


def test_it_suggests_the_roles_it_learnt(state: Path) -> None:
    run(state)
    teacher, friend = load_checkpoint(state / "out", parts=frozenset()).roles
    assert (teacher.name, friend.name) == ("Teacher", "Good conversation")
    assert teacher.text.startswith("You are a wise and friendly teacher.")
    assert friend.text == "You enjoy having a good conversation."


def test_its_card_is_written_once(state: Path) -> None:
    run(state)
    card = state / "out" / "README.md"
    assert card.read_text(encoding="utf-8").startswith("---\nlicense: ")
    card.write_text("filled in")
    run(state)
    assert card.read_text() == "filled in"


def test_codes_of_another_codec_are_refused(state: Path) -> None:
    (state / "codes" / "about.json").write_text('{"codebooks": "another"}')
    with pytest.raises(ValueError, match="learnt other codes"):
        run(state)


def test_without_a_language_model_says_what_to_run(state: Path) -> None:
    (state / "lm" / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.lm"):
        run(state)


def test_every_published_name_has_a_learnt_voice_of_its_sex() -> None:
    stored = [f"prompt-{number:02d}-{which}" for number in range(12) for which in range(3)]
    learnt = [0, 1, 2, 3]
    given = export.voice_prompts(learnt, stored)
    assert set(given) == set(VOICES)
    for number in learnt:
        assert given[VOICE_NAMES[AGENT_VOICES[number]]] == f"prompt-{number:02d}-0"
    for name, prompt in given.items():
        assert VOICE_NAMES[AGENT_VOICES[int(prompt[7:9])]][3] == name[3]
    assert len({prompt for name, prompt in given.items() if name[3] == "F"}) == 6, "two voices, three prompts"
    assert export.voice_prompts([], stored) == {}

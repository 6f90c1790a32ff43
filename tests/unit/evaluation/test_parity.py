"""Parity: it passes on the golden runs and on others of the format, and fails when something is not the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.golden import GoldenError, LmGolden, MimiGolden, read_goldens
from evaluation.parity import main, run_golden
from evaluation.play import LmOutcome
from evaluation.verdict import Row, compare_lm, compare_mimi, report
from models.checkpoint_tensors import lm_shapes
from models.config import LMConfig
from models.lm import LanguageModel
from tests.published_reference import golden_run

DATA = Path(__file__).parents[2] / "data"


def golden(folder: Path, name: str) -> Any:
    return next(found for found in read_goldens(folder) if found.name == name)


def missed(folder: Path, name: str) -> set[str]:
    return {row.measure for row in run_golden(golden(folder, name), "cpu") if not row.met}


def copied(folder: Path, name: str) -> Path:
    for path in DATA.glob(f"{name}*"):
        shutil.copy(path, folder)
    return folder


def test_the_golden_runs_hold_and_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA)]) == 0
    out = capsys.readouterr().out
    assert "all 12 tolerances met" in out
    for line in ("lm_7b_state_dict.json", "lm_small, alone", "lm_small, slot 3 of 5", "mimi_small, slot 3 of 5"):
        assert line in out
    assert out.count("100/100") == 2
    assert out.count("480/480") == 2


def test_the_reference_written_from_the_description_is_the_published_model() -> None:
    """The slow one, held against the golden run: what it then says of other sizes can be trusted."""
    run = load_file(DATA / "lm_small_golden.safetensors")
    weights = {name: tensor.float() for name, tensor in load_file(DATA / "lm_small.safetensors").items()}
    config = json.loads((DATA / "lm_small_config.json").read_text())
    steps = 30
    made = golden_run(weights, config, run["voice_prompt_codes"], run["text_prompt_tokens"], run["user_codes"][:steps])
    assert torch.equal(made["expected_tokens"], run["expected_tokens"][:steps])
    assert (made["expected_text_logits"] - run["expected_text_logits"][:steps]).abs().max() < 2e-5
    audio = run["expected_audio_logits_every_10"][: len(range(0, steps, 10))]
    assert (made["expected_audio_logits_every_10"] - audio).abs().max() < 2e-5


NARROW = LMConfig(
    dim=24,
    text_card=60,
    num_heads=2,
    num_layers=2,
    hidden_scale=4.0,
    context=16,  # shorter than the prompt
    max_period=300.0,
    depformer_dim=12,
    depformer_dim_feedforward=48,
    depformer_num_heads=3,
    depformer_num_layers=1,
)
OTHER_DELAYS = LMConfig(
    dim=16,
    text_card=50,
    num_heads=4,
    num_layers=1,
    context=25,
    depformer_dim=8,
    depformer_dim_feedforward=40,
    depformer_num_heads=1,
    depformer_num_layers=3,
    delays=(0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1),
)


@pytest.mark.parametrize("config", [NARROW, OTHER_DELAYS], ids=["narrow", "other delays"])
def test_runs_of_other_sizes_contexts_and_weights_hold(config: LMConfig, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(8)
    shapes = lm_shapes(LanguageModel(config, device="meta"), 16)
    weights = {
        # Half a unit of fan-in: logits of some tens would ask for more digits than fp32 has.
        name: (torch.randn(shape, generator=generator) * (0.5 if "emb" in name else shape[-1] ** -0.5)).half()
        for name, shape in shapes.items()
    }
    run = golden_run(
        {name: tensor.float() for name, tensor in weights.items()},
        asdict(config),
        torch.randint(2048, (7, 8), generator=generator),
        torch.randint(config.text_card, (4,), generator=generator),
        torch.randint(2048, (45, 8), generator=generator),
    )
    save_file(weights, tmp_path / "other.safetensors")
    save_file(run, tmp_path / "other_golden.safetensors")
    (tmp_path / "other_config.json").write_text(json.dumps(asdict(config)))
    assert missed(tmp_path, "other") == set()


LM_MEASURES = {"steps with equal tokens", "text logits, largest error", "audio logits, largest error"}


def scaled(name: str, weight: str, factor: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / f"{name}.safetensors")
        tensors[weight] = (tensors[weight].float() * factor).half()
        save_file(tensors, folder / f"{name}.safetensors")

    return change


def configured(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / f"{name}_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return write


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            scaled("lm_small", "transformer.layers.1.self_attn.in_proj_weight", 1.01),
            LM_MEASURES - {"steps with equal tokens"},
        ),
        (scaled("lm_small", "depformer.layers.0.gating.7.linear_in.weight", 1.01), {"audio logits, largest error"}),
        (configured("lm_small", lambda config: config.update(context=39)), {"text logits, largest error"}),
        (configured("lm_small", lambda config: config.update(context=41)), {"text logits, largest error"}),
        (configured("lm_small", lambda config: config.update(max_period=9_000)), {"text logits, largest error"}),
    ],
)
def test_another_language_model_misses(change: Callable[[Path], None], expected: set[str], tmp_path: Path) -> None:
    change(copied(tmp_path, "lm_small"))
    assert missed(tmp_path, "lm_small") >= expected


@pytest.mark.parametrize(
    "change",
    [
        scaled("mimi_small", "decoder.model.5.convtr.convtr.bias", 1.1),
        scaled("mimi_small", "decoder_transformer.transformer.layers.1.linear2.weight", 1.1),
        configured("mimi_small", lambda config: config["transformer"].update(context=19)),
        configured("mimi_small", lambda config: config["transformer"].update(context=21)),
    ],
)
def test_another_codec_misses(change: Callable[[Path], None], tmp_path: Path) -> None:
    change(copied(tmp_path, "mimi_small"))
    assert "PCM, largest error" in missed(tmp_path, "mimi_small")


def test_codes_of_another_encoder_miss(tmp_path: Path) -> None:
    scaled("mimi_small", "encoder.model.14.conv.conv.weight", 1.2)(copied(tmp_path, "mimi_small"))
    assert missed(tmp_path, "mimi_small") == {"equal codes"}


def test_a_miss_is_the_commands_exit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled("mimi_small", "decoder.model.5.convtr.convtr.bias", 1.1)(copied(tmp_path, "mimi_small"))
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "2 of 4 tolerances missed" in out
    assert out.count("MISSED") == 2


def test_a_manifest_of_another_model_is_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(tmp_path, "mimi_small")
    (tmp_path / "lm_7b_state_dict.json").write_text('{"emb.0.weight": [[2049, 4096], "bfloat16"]}')
    assert main([str(tmp_path)]) == 1
    assert "missing: out_norm.alpha" in capsys.readouterr().out


# The comparison itself


def outcome_of(run: LmGolden) -> LmOutcome:
    """What an exact implementation gives; audio logits between the recorded steps are anything."""
    card = run.audio_logits.shape[2]
    audio = torch.randn(len(run.user), 8, card)
    audio[:: run.every] = run.audio_logits
    return LmOutcome(run.tokens.clone(), run.text_logits.clone(), audio)


def changed(outcome: LmOutcome, part: str) -> LmOutcome:
    tensor: Tensor = getattr(outcome, part)
    tensor[-10].view(-1)[3] += 1 if part == "tokens" else 3e-5
    return outcome


def test_each_measure_sees_its_own_fault() -> None:
    run = golden(DATA, "lm_small")
    assert all(row.met for row in compare_lm("", run, outcome_of(run)))
    for part, measure in (("tokens", "steps"), ("text_logits", "text"), ("audio_logits", "audio")):
        rows = compare_lm("", run, changed(outcome_of(run), part))
        assert [row.measure.split()[0] for row in rows if not row.met] == [measure]


def test_nan_is_a_miss() -> None:
    run = golden(DATA, "mimi_small")
    pcm = run.pcm_out.clone()
    pcm[5, 5] = torch.nan
    rows = compare_mimi("", run, run.codes, pcm)
    assert [row.met for row in rows] == [True, False]


def test_one_code_in_a_hundred_may_differ() -> None:
    run = golden(DATA, "mimi_small")
    for flipped, met in ((4, True), (5, False)):
        codes = run.codes.clone()
        codes.view(-1)[:flipped] += 1
        assert compare_mimi("", run, codes, run.pcm_out)[0].met is met


def test_the_report_names_what_missed() -> None:
    rows = [Row("a", "tokens", "1/2", "2", False), Row("b", "PCM", "1e-6", "2e-5", True)]
    lines = report(rows).splitlines()
    assert lines[1].endswith("MISSED")
    assert lines[2].endswith("ok")
    assert lines[-1] == "1 of 2 tolerances missed"


# Folders


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def reshaped(folder: Path) -> None:
    run = load_file(folder / "mimi_small_golden.safetensors")
    save_file({**run, "pcm_in": run["pcm_in"][:-1].clone()}, folder / "mimi_small_golden.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("mimi_small.safetensors"), "needs mimi_small.safetensors beside it"),
        (remove("mimi_small_config.json"), "needs mimi_small_config.json"),
        (remove("mimi_small_golden.safetensors"), "nothing to compare with"),
        (reshaped, "do not go with"),
        (lambda folder: (folder / "mimi_small_golden.safetensors").write_bytes(b"x"), "mimi_small"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "mimi_small_golden.safetensors"), "is neither"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "mimi_small.safetensors"), "superfluous: a"),
    ],
)
def test_a_folder_that_cannot_be_read_is_exit_2(
    change: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copied(tmp_path, "mimi_small"))
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_none_is_exit_2(tmp_path: Path) -> None:
    assert main([str(tmp_path / "missing")]) == 2
    with pytest.raises(GoldenError, match="is not a folder"):
        read_goldens(tmp_path / "missing")


def test_goldens_are_read_by_what_they_hold() -> None:
    assert [type(found) for found in read_goldens(DATA)] == [LmGolden, MimiGolden]

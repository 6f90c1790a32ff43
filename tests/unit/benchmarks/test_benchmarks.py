"""What the benchmarks say: the roofline's bytes, whole reports, and a clear word where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import frame, gpu
from models.config import LMConfig
from models.lm import LanguageModel


@pytest.fixture
def published() -> LanguageModel:
    return LanguageModel(LMConfig(), device="meta", dtype=torch.bfloat16)


def test_a_frame_of_the_published_model_reads_its_weights_once(published: LanguageModel) -> None:
    """13.15 GB temporal, 0.26 GB text head, 1.33 GB depth for eight codebooks; tables are looked up, not read."""
    assert frame.step_bytes(published, 0, 1) == pytest.approx(14.75e9, rel=0.001)


def test_each_frame_of_context_is_half_a_megabyte_a_slot(published: LanguageModel) -> None:
    one = frame.step_bytes(published, 1, 101) - frame.step_bytes(published, 1, 100)
    assert one == 512 << 10
    assert frame.step_bytes(published, 8, 101) - frame.step_bytes(published, 8, 100) == 8 * one


def test_context_beyond_the_window_is_not_read(published: LanguageModel) -> None:
    assert frame.step_bytes(published, 1, 5_000) == frame.step_bytes(published, 1, 2_999)


def test_a_shape_is_a_name_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"lm": {"dim": 64}, "mimi": {}}))
    assert frame.shapes_of(str(tmp_path))[0].dim == 64
    with pytest.raises(ValueError, match="neither demo nor 7b"):
        frame.shapes_of("70b")


def test_the_gpu_report_is_whole_after_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--shape", "demo", "--slots", "1", "2", "--context", "10", "20", "--skip-tests"]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["slots"], row["context_frames"]) for row in report["frames"]] == [(1, 10), (1, 20), (2, 10), (2, 20)]
    assert all(row["roofline_ms"] > 0 for row in report["frames"])
    with Image.open(tmp_path / "gpu-frame.png") as plot:
        assert plot.width > 500
    assert "together" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == gpu.NO_DEVICE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "make gpu needs a CUDA GPU" in said
    assert not (tmp_path / "gpu.json").exists()


def test_gpu_tests_are_found_and_counted(tmp_path: Path) -> None:
    """They run with pytest alone: no plugin, no configuration of ours. Here they are skipped for want of a GPU."""
    counts = gpu.run_tests(tmp_path)
    assert counts["failed"] == 0, counts
    assert set(counts) >= {"passed", "failed"}

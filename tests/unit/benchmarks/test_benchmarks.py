"""What the benchmarks say: the roofline's bytes, whole reports, and a clear word where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import frame, gpu
from benchmarks.gpu_report import targets
from benchmarks.setting import shapes_of
from models.config import LMConfig
from models.lm import LanguageModel

ROOT = Path(__file__).parents[3]
ABSENT = [
    "hypothesis",
    "numba",
    "llvmlite",
    "ray",
    "fastapi",
    "pydantic",
    "msgpack",
    "websockets",
    "typer",
    "matplotlib",
]


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
    assert shapes_of(str(tmp_path))[0].dim == 64
    with pytest.raises(ValueError, match="neither demo nor 7b nor tiny"):
        shapes_of("70b")


def test_parts_of_the_gpu_run_can_be_tried_alone_and_taken_up_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dry = ["--dry", "--out", str(tmp_path)]
    assert gpu.main([*dry, "--only", "codec", "step"]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["ended"] == {"codec": "done", "step": "done"}
    assert [(row["slots"], row["context_frames"], row["kv"]) for row in report["step"]] == [
        (4, 299, "bfloat16"),
        (1, 299, "float8_e4m3fn"),
        (4, 74, "bfloat16"),
    ]
    assert {row["runner"] for row in report["codec"]} == {"static", "torch"}
    with Image.open(tmp_path / "gpu-frame.png") as plot:
        assert plot.width > 500
    assert "frame step at 32 sessions, ms" in capfd.readouterr().out
    # As if the step had been cut off after its first row: that row stays, the others are measured again.
    first = report["step"][0]
    (tmp_path / "gpu.json").write_text(json.dumps({**report, "ended": {"codec": "done"}, "step": [first]}))
    assert gpu.main([*dry, "--only", "codec", "step", "--resume"]) == 0
    again = json.loads((tmp_path / "gpu.json").read_text())
    assert again["codec"] == report["codec"]
    assert again["step"][0] == first
    assert len(again["step"]) == 3
    assert "codec:" not in capfd.readouterr().out


def test_a_part_that_is_cut_off_takes_nothing_with_it(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"step": [{"slots": 1, "kv": "float8_e4m3fn"}]}))
    assert gpu.main(["--dry", "--out", str(tmp_path), "--only", "peer", "codec", "--limit-s", "0.2", "--resume"]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["step"] == [{"slots": 1, "kv": "float8_e4m3fn"}]
    assert report["ended"]["peer"].startswith("stopped after")
    assert report["ended"]["codec"] == "no time was left for it"


def test_targets_are_judged_by_the_rows_that_fit() -> None:
    full = {"context_frames": 2_999, "kv": "bfloat16"}
    content = {
        "step": [
            {"slots": 32, "step_ms": 31.0, **full},
            {"slots": 32, "step_ms": 12.0, **full, "kv": "float8_e4m3fn"},
            {"slots": 1, "step_ms": 7.0, **full},
            {"slots": 1, "step_ms": 5.0, **full, "context_frames": 128},
        ],
        "capacity": [{"kv": "bfloat16", "most": 90}, {"kv": "float8_e4m3fn", "most": 74}],
        "prefill": [{"others": 3, "what": "prompt, cached", "ready_ms": 9.0}],
    }
    found = [(target.measured, target.met) for target in targets(content, 2_999)]
    assert found[:3] == [(31.0, False), (7.0, True), (74, True)]
    assert found[3:] == [(None, None)] * 3


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


def test_gpu_tests_need_nothing_that_a_gpu_machine_lacks() -> None:
    """Torch, numpy, safetensors and pytest are there; whatever else a test module imports would cost all the others."""
    files = gpu.files_with_gpu_tests(ROOT)
    code = (
        "import sys, pytest\n"
        f"for name in {ABSENT!r}: sys.modules[name] = None\n"
        "sys.exit(pytest.main(['-q', '--collect-only', '-m', 'gpu', '-c', '/dev/null', '--rootdir', '.', "
        "'--import-mode=importlib', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3_000:]
    assert {"test_codec_cuda.py", "test_vllm_cuda.py", "test_same_tokens.py"} <= {Path(file).name for file in files}

"""The bench of a step's parts tries itself on a CPU, so that a lent GPU's first minute is not spent on its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import frame, step_parts
from graphs.backends import make_cache
from models.config import LMConfig
from tests.golden import DATA


@pytest.mark.parametrize("kv", ["model", "fp8"])
def test_every_part_is_timed_beside_its_roofline(kv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = json.loads((DATA / "lm_small_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"lm": lm}))
    assert step_parts.main(["--shape", str(tmp_path), "--slots", "2", "--device", "cpu", "--kv", kv]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ours")]
    assert [line.split()[1] for line in lines] == ["products", "attention", "draws", "whole"]
    ratios = [float(re.findall(r"ratio +([\d.]+)", line)[0]) for line in lines]
    assert min(ratios) > 1, "nothing reads faster than the memory it was compared with"


def test_fp8_halves_what_attention_reads_but_for_its_scales() -> None:
    config = LMConfig(dim=256, num_heads=2, num_layers=1, context=40)
    stored = [
        make_cache(config, 1, 8, device=torch.device("cpu"), dtype=torch.bfloat16, backend=backend)
        for backend in ("static", "static-fp8")
    ]
    assert frame.key_bytes(stored[0]) == 2.0
    assert frame.key_bytes(stored[1]) == 1.0 + 2 / 128

"""The backends' benchmark runs, on a shape that takes no time, and says what the self-test picks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphs.sampling import HAS_NUMBA
from tests.golden import DATA

pytestmark = pytest.mark.skipif(not HAS_NUMBA, reason="other kernels serve the compiled step: install numba")


def test_it_prints_a_line_for_each_candidate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import backends

    lm = json.loads((DATA / "lm_small_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"lm": lm}))
    monkeypatch.setattr("benchmarks.timing.MOST_CALLS", 3)
    monkeypatch.setattr(backends, "ROUNDS", 1)
    monkeypatch.setattr(backends, "candidates", lambda: [("ours", "ours"), ("pages", "ours"), ("ours", "onednn")])
    assert backends.main(["--shape", str(tmp_path), "--slots", "2", "--context", "5", "30"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5
    assert all(line.count("×)") == 3 for line in said[1:4])
    assert "the self-test picks attention ours" in said[4]

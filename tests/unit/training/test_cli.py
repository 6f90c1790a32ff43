"""`personaplex train`: stages refuse what is not ready, and status tells what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training import cli
from training.folders import FROZEN, Log, write_json


@pytest.fixture(name="state")
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERSONAPLEX_TRAINING_STATE", str(tmp_path))
    return tmp_path


class TestStatus:
    def test_of_nothing(self, state: Path) -> None:
        said = CliRunner().invoke(cli.app, ["status"])
        assert said.exit_code == 0
        assert "codec      not begun" in said.output

    def test_shows_the_newest_of_each_figure(self, state: Path) -> None:
        log = Log(state / "codec" / "log.jsonl")
        log.write(step=10, mel=2.0)
        log.write(step=20, mel=1.5)
        log.write(step=20, val_mel=1.75)
        assert "codec      step 20: mel 1.500, val_mel 1.750" in CliRunner().invoke(cli.app, ["status"]).output


class TestNextStage:
    def test_follows_what_is_there(self, state: Path) -> None:
        assert cli.next_stage(state) == "data"
        write_json(state / "pcm" / "index.json", {"train": 1})
        assert cli.next_stage(state) == "hearing"
        write_json(state / "codec" / "gates.json", {"codes_passed": False, "passed": False})
        assert cli.next_stage(state) == "hearing"
        write_json(state / "codec" / "gates.json", {"codes_passed": True, "passed": False})
        assert cli.next_stage(state) == "freeze"
        (state / "codec" / FROZEN).write_text("7000")
        assert cli.next_stage(state) == "codes"
        write_json(state / "codes" / "about.json", {"hearing": "1"})
        assert cli.next_stage(state) == "codes"
        write_json(state / "codes" / "about.json", {"hearing": "1", "complete": True})
        assert cli.next_stage(state) == "codec"
        write_json(state / "codec" / "gates.json", {"codes_passed": True, "passed": True})
        assert cli.next_stage(state) == "lm"


class TestFreeze:
    def test_a_codec_that_has_not_passed_is_not_frozen(self, state: Path) -> None:
        write_json(state / "codec" / "gates.json", {"codes_passed": False})
        said = CliRunner().invoke(cli.app, ["freeze"])
        assert said.exit_code != 0
        assert not (state / "codec" / FROZEN).exists()

    def test_remembers_since_when(self, state: Path) -> None:
        write_json(state / "codec" / "gates.json", {"codes_passed": True})
        write_json(state / "codec" / "state.json", {"step": 0, "hearing_step": 7000, "shards": []})
        assert CliRunner().invoke(cli.app, ["freeze"]).exit_code == 0
        write_json(state / "codec" / "state.json", {"step": 0, "hearing_step": 9000, "shards": []})
        assert CliRunner().invoke(cli.app, ["freeze"]).exit_code == 0
        assert json.loads((state / "codec" / FROZEN).read_text()) == 7000

    def test_dialogues_are_not_encoded_with_a_codec_that_still_changes(self, state: Path) -> None:
        assert CliRunner().invoke(cli.app, ["codes"]).exit_code != 0

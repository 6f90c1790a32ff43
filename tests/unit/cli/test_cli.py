"""The command line: help that comes at once, and one clear sentence for whatever is asked wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from graphs.stages import Sampling
from loadtest.callers import CALLERS
from loadtest.chat_client import ChatFailed, Conversation
from loadtest.chat_wire import ChatOptions
from loadtest.speech import Recording
from loadtest.timings import Timings
from serving.catalog import Catalog
from serving.cli.demo import Call, heading_of, what_was_wrong
from serving.cli.main import app
from serving.offline_app import pick_sampling
from serving.tenants import Tenants
from tests.small_checkpoint import write_small_checkpoint

COMMANDS = [
    [], ["serve"], ["talk"], ["demo"], ["deploy"], ["drain"], ["loadtest"], ["replicas"], ["keys"], ["voices"],
    ["voices", "add"], ["evaluate"], ["bench"], ["bench", "frame"], ["bench", "capacity"],
]  # fmt: skip

RANDOM = ("--checkpoint", "demo-random")

# What takes seconds to import; --help may not.
HEAVY = ("torch", "ray", "numpy", "fastapi", "matplotlib", "soundfile", "serving.settings")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def error_of(result: Result, code: int) -> str:
    """The one sentence a failed command says."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    soundfile.write(path, np.zeros(24_000), 24_000)
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_with_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output
    assert "[]" not in result.output  # an argument without a name
    if command != ["bench"]:
        assert f"personaplex {' '.join(command)}".strip() in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from serving.cli.main import app\n"
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_shows_the_help() -> None:
    assert "Usage:" in run().output


class TestServe:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--slots", "0"], "--slots"),
            (["--device", "tpu"], "--device"),
            (["--port", "70000"], "--port"),
            (["--host", "0.0.0.0"], "keys_file"),
        ],
    )
    def test_a_wrong_setting_is_named(self, arguments: list[str], said: str) -> None:
        assert said in error_of(run("serve", *arguments), 2)

    def test_a_missing_checkpoint_is_named(self) -> None:
        assert "/nowhere/at/all" in error_of(run("serve", "--checkpoint", "/nowhere/at/all"), 1)

    def test_a_keys_file_that_cannot_be_used_is_named(self, tmp_path: Path) -> None:
        keys = tmp_path / "keys.toml"
        keys.write_text('[[tenants]]\nname = "acme"\nkeys = ["plain text"]\n')
        said = error_of(run("serve", "--keys-file", str(keys)), 1)
        assert str(keys) in said
        assert "plain text" not in said

    def test_settings_can_be_listed(self) -> None:
        result = run("serve", "--list-settings")
        assert result.exit_code == 0
        for name in ("checkpoint", "idle_timeout_s", "opus_complexity"):
            assert name in result.output


class TestTalk:
    def test_a_missing_recording_is_named(self, tmp_path: Path) -> None:
        missing = tmp_path / "missing.wav"
        assert str(missing) in error_of(run("talk", str(missing), "out.wav"), 2)

    def test_what_is_no_audio_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "text.wav"
        path.write_text("hello")
        assert "cannot be read as audio" in error_of(run("talk", str(path), "out.wav"), 2)

    def test_a_role_file_that_is_missing_is_named(self, question: Path) -> None:
        assert "nobody.txt" in error_of(run("talk", str(question), "out.wav", "--role", "@nobody.txt"), 2)

    def test_a_seed_that_no_engine_takes_is_refused(self, question: Path) -> None:
        assert "--seed" in error_of(run("talk", str(question), "out.wav", "--seed", str(2**63)), 2)

    def test_a_seed_that_is_no_number_is_refused(self, question: Path) -> None:
        result = run("talk", str(question), "out.wav", "--seed", "many")
        assert result.exit_code == 2
        assert "--seed" in result.stderr

    def test_a_server_that_is_not_there_is_named(self, question: Path, tmp_path: Path) -> None:
        # Port 9 is "discard"; nobody listens there.
        said = error_of(run("talk", str(question), str(tmp_path / "out.wav"), "--server", "http://127.0.0.1:9"), 1)
        assert "127.0.0.1:9" in said
        assert not (tmp_path / "out.wav").exists()

    def test_a_server_that_is_no_address_is_refused(self, question: Path) -> None:
        assert "no server's address" in error_of(run("talk", str(question), "out.wav", "--server", "ftp://x"), 2)

    def test_a_server_is_asked_for_no_more_than_was_named(
        self, question: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[ChatOptions] = []

        async def refuse(_: str, __: Recording, options: ChatOptions, **___: object) -> Conversation:
            asked.append(options)
            raise ChatFailed("not today")

        monkeypatch.setattr("loadtest.chat_client.hold_conversation", refuse)
        call = ("talk", str(question), str(tmp_path / "out.wav"), "--server", "http://127.0.0.1:9")
        assert "not today" in error_of(run(*call), 1)
        error_of(run(*call, "--text-temperature", "0.7", "--audio-topk", "9"), 1)
        assert [dict(options.query) for options in asked] == [{}, {"text_temperature": "0.7", "audio_topk": "9"}]

    def test_without_a_server_what_is_not_named_is_the_checkpoints(self) -> None:
        catalog = Catalog("small", True, ("A",), sampling=Sampling(0.4, 25, 0.6, 250))
        assert pick_sampling(catalog, {}) == Sampling(0.4, 25, 0.6, 250)
        assert pick_sampling(catalog, {"audio_temperature": 0.8}) == Sampling(0.4, 25, 0.8, 250)
        with pytest.raises(ValueError, match="top-k 513"):
            pick_sampling(catalog, {"text_top_k": 513})

    def test_an_unknown_voice_is_refused_before_actors_start(self, question: Path) -> None:
        assert "../etc/passwd" in error_of(run("talk", str(question), "out.wav", "--voice", "../etc/passwd"), 1)


class TestDemo:
    def test_a_server_that_is_not_there_is_named(self) -> None:
        assert "127.0.0.1:9" in error_of(run("demo", "--server", "http://127.0.0.1:9"), 1)

    def test_a_call_that_fell_behind_or_was_cut_short_is_wrong(self) -> None:
        recording = Recording.of("caller", np.zeros(20 * 1920, dtype=np.float32))

        def call(beat_s: float, samples: int) -> Call:
            timings = Timings(opened_s=0.0)
            timings.on_ready(0.1)
            for k in range(20):
                timings.on_heard(1.0 + beat_s * k, 1920)
            held = Conversation(timings, agent=np.zeros(samples, dtype=np.float32))
            return Call(CALLERS[0], recording, "NATF0", 1, held=held)

        whole = len(recording.pcm)
        assert what_was_wrong(call(0.08, whole)) is None
        assert "not in real time" in str(what_was_wrong(call(0.09, whole)))
        assert "heard 5 of" in str(what_was_wrong(call(0.08, 5)))
        assert what_was_wrong(Call(CALLERS[0], recording, "NATF0", 1, failure="no slot is free")) == "no slot is free"

    @pytest.mark.parametrize(
        ("told", "heading"),
        [
            ({"lm_model_file": "personaplex-demo", "trained": True}, "1 conversations at once with personaplex-demo"),
            (
                {"lm_model_file": "x", "trained": False},
                "1 conversations at once, the agents babbling: their weights are",
            ),
            ({}, "1 conversations at once"),
        ],
    )
    def test_the_picture_says_whom_they_talked_to(self, told: dict[str, Any], heading: str) -> None:
        recording = Recording.of("caller", np.zeros(1920, dtype=np.float32))
        held = Conversation(Timings(opened_s=0.0), agent=np.zeros(1920, dtype=np.float32), metadata=told)
        failed = Call(CALLERS[1], recording, "NATF0", 2, failure="no slot is free")
        assert heading_of([Call(CALLERS[0], recording, "NATF0", 1, held=held), failed]).startswith(heading)


class TestDeploy:
    def test_a_cluster_that_is_not_there_is_named_at_once(self) -> None:
        # Port 9 is "discard"; nobody listens there.
        assert "127.0.0.1:9" in error_of(run("deploy", "--address", "127.0.0.1:9"), 1)

    def test_a_wrong_setting_is_named(self) -> None:
        assert "min_replicas" in error_of(run("deploy", "--replicas", "3", "--max-replicas", "2"), 2)


class TestVoices:
    def test_the_demo_checkpoints_voices_are_listed(self) -> None:
        result = run("voices")
        assert result.exit_code == 0
        assert "NATF2" in result.stdout.split()

    def test_a_missing_checkpoint_is_named(self) -> None:
        assert "/nowhere" in error_of(run("voices", "--checkpoint", "/nowhere"), 1)

    @pytest.mark.parametrize("name", ["../anna", "an na", "", "a" * 65])
    def test_a_name_that_could_be_a_path_is_refused(self, name: str, question: Path) -> None:
        assert "cannot be a voice's name" in error_of(run("voices", "add", name, str(question)), 2)

    def test_a_recording_too_short_is_refused(self, question: Path) -> None:
        assert "1.0 s" in error_of(run("voices", "add", "anna", str(question), *RANDOM), 1)

    def test_the_model_that_ships_gets_no_voices(
        self, question: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_small_checkpoint(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("models.checkpoint_files.SHIPPED_DEMO", tmp_path)
        assert f"cp -r {tmp_path} my-demo" in error_of(run("voices", "add", "anna", str(question)), 1)
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_voice_that_exists_is_not_overwritten_unasked(self, question: Path) -> None:
        assert "--replace" in error_of(run("voices", "add", "NATF2", str(question), *RANDOM), 1)


class TestKeys:
    def test_the_file_gets_the_hash_and_the_key_opens_the_server(self, tmp_path: Path) -> None:
        result = run("keys", "acme", "--max", "3")
        assert result.exit_code == 0
        key = result.stderr.split()[-1]
        assert key not in result.stdout
        (tmp_path / "keys.toml").write_text(result.stdout)
        tenant = Tenants.load(tmp_path / "keys.toml").authenticate({"authorization": f"Bearer {key}"}, {})
        assert (tenant.name, tenant.max_conversations) == ("acme", 3)

    def test_two_keys_differ(self) -> None:
        assert run("keys", "acme").stderr != run("keys", "acme").stderr

    def test_a_name_that_would_break_the_file_is_refused(self) -> None:
        assert "tenant's name" in error_of(run("keys", 'ac"me'), 2)


class TestBench:
    def test_rows_as_json_and_a_picture(self, tmp_path: Path) -> None:
        picture = tmp_path / "frame.png"
        shown = ["--json", "--plot", str(picture)]
        result = run("bench", "frame", "--slots", "1", "4", "--context", "10", "--threads", "1", *shown)
        assert result.exit_code == 0, result.stderr
        rows = json.loads(result.stdout)
        assert [(row["slots"], row["context_frames"]) for row in rows] == [(1, 10), (4, 10)]
        for row in rows:
            assert all(row[name] > 0 for name in ("encode_ms", "prefill_ms", "step_ms", "decode_ms", "ratio"))
            assert row["ratio"] == pytest.approx(row["step_ms"] / row["roofline_ms"], rel=0.02)
        assert picture.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--slots", "many"], "whole numbers"),
            (["--slots", "0"], "whole numbers"),
            (["4"], "come after --slots"),
            (["--device", "tpu"], "no device"),
            (["--checkpoint", "/nowhere"], "/nowhere"),
        ],
    )
    def test_what_is_asked_wrongly_is_said(self, arguments: list[str], said: str) -> None:
        assert said in error_of(run("bench", "frame", *arguments), 2)

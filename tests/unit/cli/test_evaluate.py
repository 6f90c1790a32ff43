"""`personaplex evaluate`, from items to exit status: a real socket, and a stand-in for the judges' environment."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
import sphn
from typer.testing import CliRunner, Result
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from evaluation.duplex.items import Cue
from evaluation.duplex.user import FRAME_SAMPLES, RATE
from serving.cli.main import app
from tests.unit.evaluation.duplex_items import item, tone, turn, write

# What the judges' environment is asked to do: say that it is there, make items, judge conversations.
STAND_IN = """#!{python}
import json, pathlib, shutil, sys
module, *rest = sys.argv[2:]
here = pathlib.Path({here!r})
if "--check" in rest:
    sys.exit(0)
(here / "asked").open("a").write(module + " " + " ".join(rest[1:]) + "\\n")
out = pathlib.Path(rest[0])
if module == "training.evaluation_items":
    for folder in sorted((here / "made").iterdir()):
        if not (out / "items" / folder.name).exists():
            shutil.copytree(folder, out / "items" / folder.name)
        print(json.dumps({{"item": folder.name}}), flush=True)
else:
    for folder in sorted((out / "items").iterdir()):
        if (folder / "recording.json").exists() and not (folder / "judged.json").exists():
            (folder / "judged.json").write_text((here / "verdict.json").read_text())
            print(json.dumps({{"judged": folder.name}}), flush=True)
"""


class Host:
    """A server with a thread: says who it is, and answers frame for frame with a tone from 1.2 to 1.6 s."""

    def __init__(self, trained: bool = True) -> None:
        self.trained, self.calls, self.fail = trained, 0, False
        self.url = ""
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        async with serve(self._talk, "127.0.0.1", 0, compression=None, process_request=self._answer) as server:
            self.url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            self._up.set()
            await self._over.wait()

    def _answer(self, _: ServerConnection, request: Request) -> Response | None:
        data = {"/v1/models": [{"id": "personaplex-demo", "trained": self.trained}], "/v1/voices": [{"id": "NATF0"}]}
        if request.path not in data:
            return None
        body = json.dumps({"data": data[request.path]}).encode()
        headers = Headers({"Content-Length": str(len(body)), "Connection": "close"})
        return Response(HTTPStatus.OK, "OK", headers, body)

    async def _talk(self, connection: ServerConnection) -> None:
        self.calls += 1
        if self.fail:
            await connection.send(b"\x05not today")
            await connection.close(1011)
            return
        metadata = json.dumps({"lm_model_file": "personaplex-demo", "trained": self.trained}).encode()
        await connection.send(b"\x00\x00\x00")
        await connection.send(b"\x04" + metadata)
        ear, voice = sphn.OpusStreamReader(RATE), sphn.OpusStreamWriter(RATE)
        heard = frame = 0
        async for message in connection:
            assert isinstance(message, bytes)
            heard += len(ear.append_bytes(message[1:]))
            while frame < heard // FRAME_SAMPLES:
                sound = tone(FRAME_SAMPLES) if 15 <= frame < 20 else np.zeros(FRAME_SAMPLES, dtype=np.float32)
                await connection.send(b"\x01" + bytes(voice.append_pcm(sound)))
                frame += 1

    def __enter__(self) -> Host:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture(autouse=True)
def in_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine keeps up is no question here: what a call that stalled is worth is tested where it is."""
    monkeypatch.setattr("evaluation.duplex.record.LAG_MOVES_S", math.inf)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as running:
        yield running


@pytest.fixture
def judges(tmp_path: Path) -> Path:
    """Makes one item, a question that ends at 0.98 s, and hears an answer from 1.3 to 4.0 s."""
    here = tmp_path / "judges"
    write(here / "made" / "a", item(turn(0, Cue("user", 0.08), answer=True), name="a"))
    python = here / "bin" / "python"
    python.parent.mkdir()
    python.write_text(STAND_IN.format(python=sys.executable, here=str(here)), encoding="utf-8")
    python.chmod(0o755)
    words = [["yes", 1.3, 1.6], ["we", 1.6, 1.9], ["are", 1.9, 2.2]]
    verdict = {"judges": {"words": "a stand-in"}, "speech": [[1.3, 4.0]], "words": words, "unaligned": 0}
    (here / "verdict.json").write_text(json.dumps({**verdict, "similarities": {"NATF0": 0.9, "NATM0": 0.1}}))
    return python


def run(*arguments: str | Path) -> Result:
    given = ("evaluate", *(str(argument) for argument in arguments))
    return CliRunner().invoke(app, given, env={"COLUMNS": "200", "TERM": "dumb"})


def asked(judges: Path) -> list[str]:
    """What the stand-in was asked to make and to judge."""
    return (judges.parents[1] / "asked").read_text().splitlines()


def test_from_items_to_a_verdict(host: Host, judges: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--out", out, "--server", host.url, "--items", "1", "--judges", judges, "--seed", "3")
    # There is no interruption and no text in it: two of three gates have nothing to show, and so are not met.
    assert result.exit_code == 3, result.output
    assert "takes its turn within 1 s" in result.output
    assert str(out / "report.html") in result.output
    report = json.loads((out / "report.json").read_text())
    assert [(gate["n"], gate["passed"]) for gate in report["gates"][:3]] == [(0, False), (1, True), (0, False)]
    assert report["server"]["model"] == "personaplex-demo"
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert asked(judges)[0] == "training.evaluation_items --plan first --items 1 --seed 3"


def test_the_same_command_goes_on_where_it_was(host: Host, judges: Path, tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "out", "--server", host.url, "--items", "1", "--judges", judges)
    host.fail = True
    failed = run(*arguments)
    assert failed.exit_code == 1
    assert "not today" in failed.output
    assert "the same command tries them again" in failed.output
    host.fail = False
    assert run(*arguments).exit_code == 3
    assert host.calls == 2
    # Now everything is there: nobody is called, and nothing is judged again.
    assert run(*arguments).exit_code == 3
    assert host.calls == 2
    assert [line.split()[0] for line in asked(judges)].count("evaluation.duplex.judge") == 1


def test_an_untrained_checkpoint_is_named(judges: Path, tmp_path: Path) -> None:
    with Host(trained=False) as host:
        result = run("--out", tmp_path / "out", "--server", host.url, "--items", "1", "--judges", judges)
    assert "random weights" in result.output
    assert "random weights" in (tmp_path / "out" / "report.html").read_text()


def test_another_evaluation_in_the_same_folder_is_refused(host: Host, judges: Path, tmp_path: Path) -> None:
    arguments = ("--out", tmp_path / "out", "--server", host.url, "--items", "1", "--judges", judges)
    run(*arguments)
    result = run(*arguments, "--seed", "9")
    assert result.exit_code == 1
    assert "choose another --out" in result.output


def test_without_judges_nobody_is_called(host: Host, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--server", host.url, "--judges", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "personaplex train setup" in result.output
    assert host.calls == 0
    assert not (tmp_path / "out").exists()


def test_an_unknown_suite_is_wrong_use(tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--suite", "bench")
    assert result.exit_code == 2
    assert "there is own" in result.output


def test_an_unknown_plan_is_as_well_and_leaves_nothing_behind(tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--plan", "tiny")
    assert result.exit_code == 2
    assert "first, wide" in result.output
    assert not (tmp_path / "out").exists()


def test_no_server_is_one_sentence(judges: Path, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--server", "http://127.0.0.1:1", "--items", "1", "--judges", judges)
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "Traceback" not in result.output

"""`personaplex loadtest`: what it is asked for, what it prints, and what its exit status says."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from websockets.asyncio.server import ServerConnection, serve

from loadtest import report
from serving.cli.main import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ("loadtest", *arguments), env={"COLUMNS": "200", "TERM": "dumb"})


class Echo:
    """A server with a thread and two slots, which says back what it hears and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.url = ""
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))

    async def _serve(self) -> None:
        self._over = asyncio.Event()
        async with serve(self._talk, "127.0.0.1", 0, compression=None) as server:
            self.url = f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            self._up.set()
            await self._over.wait()

    async def _talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.asked.append(connection.request.path + " " + connection.request.headers.get("authorization", ""))
        if len(self.asked) > 2:
            await connection.send(b"\x05two slots are all")
            await connection.close(1013)
            return
        await connection.send(b"\x00")
        async for message in connection:
            await connection.send(message)

    def __enter__(self) -> Echo:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine is busy with something else is not what is tested."""
    monkeypatch.setattr(report, "LATE_MS", 2_000.0)


@pytest.mark.usefixtures("patient")
def test_one_json_object_and_a_picture(echo: Echo, tmp_path: Path) -> None:
    options = ("--sessions", "2", "--seconds", "1", "--voice", "NATM1", "--role", "be kind", "--seed", "5")
    done = run(echo.url, *options, "--key", "secret", "--json", "--plot", str(tmp_path / "gaps.png"))
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["sessions"] == 2
    assert printed["valid"] is True
    assert printed["refusals"] == printed["closes"] == {}
    assert printed["frame_gap_ms"]["p50"] == pytest.approx(80, abs=20)
    assert echo.asked == [
        f"/api/chat?voice_prompt=NATM1&text_prompt=be+kind&seed={seed} Bearer secret" for seed in (5, 6)
    ]
    assert (tmp_path / "gaps.png").stat().st_size > 10_000


@pytest.mark.usefixtures("patient")
def test_a_refused_call_is_an_error_and_the_servers_reason_is_told(echo: Echo) -> None:
    done = run(echo.url, "-n", "3", "-s", "1")
    assert done.exit_code == 1
    assert "refused: 1 × 1013" in done.stdout
    assert "two slots are all" in done.stderr
    assert "1 calls were refused" in done.stderr


def test_a_late_generator_is_an_error_of_its_own(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LATE_MS", 0.0)
    done = run(echo.url, "-n", "1", "-s", "1")
    assert done.exit_code == 3
    assert "invalid" in done.stderr


def test_nobody_there_is_refused_not_a_traceback() -> None:
    done = run("http://127.0.0.1:9", "-n", "2", "-s", "1", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["refusals"] == {"none": 2}
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ftp://x",), "no server's address"),
        (("http://127.0.0.1:9", "--speech", "/nowhere.wav"), "/nowhere.wav"),
        (("http://127.0.0.1:9", "--role", "@/nowhere.txt"), "/nowhere.txt"),
        (("http://127.0.0.1:9", "--sessions", "0"), "--sessions"),
    ],
)
def test_what_is_asked_wrongly_is_said(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr

"""An evaluation in a folder, from items to verdicts; stopped anywhere, the next run goes on from there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from evaluation.duplex.items import ItemError, item_folders, read_item, write_json
from evaluation.duplex.judge import NO_JUDGES, waiting
from evaluation.duplex.record import NotLive, record
from evaluation.duplex.recording import RECORDING
from evaluation.duplex.suites import SUITES
from loadtest.chat_client import ChatFailed
from loadtest.chat_wire import WireError

REPOSITORY = Path(__file__).resolve().parents[2]
JUDGES_PYTHON = REPOSITORY / ".venv-train" / "bin" / "python"
RUN, FAILURE = "run.json", "failure.json"
SETUP = "run `personaplex train setup`, which makes .venv-train with the judges and the synthesiser"


class EvaluationError(Exception):
    """The evaluation cannot go on. The message is a sentence that says what to do."""


@dataclass(frozen=True)
class Order:
    """What is evaluated. Two runs into one folder must agree on it."""

    suite: str
    plan: str
    items: int
    seed: int


@dataclass(frozen=True)
class Server:
    """Whom the conversations are held with. model and trained are what it says of itself; voices may be unknown."""

    url: str
    model: str
    trained: bool | None
    voices: tuple[str, ...]
    notice: str = ""


def open_run(out: Path, order: Order) -> None:
    """Makes the folder, or checks that it is this order's. Raises EvaluationError."""
    path = out / RUN
    if path.exists():
        stored = _read(path)
        mine = asdict(order)
        # More items of the same kind may be asked for later.
        if {**stored["order"], "items": 0} != {**mine, "items": 0} or stored["order"]["items"] > order.items:
            raise EvaluationError(
                f"{out} holds an evaluation of {stored['order']}, not of {mine}; choose another --out"
            )
        write_json(path, {**stored, "order": mine})
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, {"order": asdict(order), "server": None})
    except OSError as error:
        raise EvaluationError(f"{out} cannot be written: {error.strerror}") from error


def meet_server(url: str, key: str | None, transport: httpx.BaseTransport | None = None) -> Server:
    """Asks a server who it is. Raises EvaluationError if it does not answer."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise EvaluationError(f"{url!r} is no server's address; give one like http://localhost:8998")
    base, headers = url.rstrip("/"), {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # `trust_env=False`: the environment's proxy is for the web.
        with httpx.Client(base_url=base, headers=headers, timeout=10.0, trust_env=False, transport=transport) as client:
            models, voices = client.get("/v1/models"), client.get("/v1/voices")
    except httpx.HTTPError as error:
        raise EvaluationError(f"{url} does not answer: {error}") from error
    if models.status_code == 404:  # a published server: it has /api/chat and says nothing of itself
        return Server(base, "", None, ())
    try:
        models.raise_for_status()
        voices.raise_for_status()
        model = models.json()["data"][0]
        names = tuple(str(voice["id"]) for voice in voices.json()["data"])
        trained = bool(model["trained"]) if "trained" in model else None
        return Server(base, str(model["id"]), trained, names, str(model.get("notice", "")))
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise EvaluationError(f"{url} does not answer as a server of ours would: {error}") from error


def enter_server(out: Path, server: Server) -> None:
    """Writes down whose conversations these are. Raises EvaluationError if others are held already."""
    stored = _read(out / RUN)
    before = stored["server"]
    if before is not None and (before["model"], before["trained"]) != (server.model, server.trained):
        raise EvaluationError(
            f"{out} holds conversations with {before['model'] or before['url']}, and {server.url} serves "
            f"{server.model or 'another model'}; choose another --out"
        )
    missing = sorted({read_item(folder).voice for folder in item_folders(out / "items")} - set(server.voices))
    if server.voices and missing:
        raise EvaluationError(f"the items want voices that {server.url} does not have: {', '.join(missing)}")
    write_json(out / RUN, {**stored, "server": asdict(server)})


def make_items(out: Path, order: Order, python: Path, on_item: Callable[[str], None]) -> None:
    """Makes what is missing of the suite's items. Raises EvaluationError."""
    arguments = ["--plan", order.plan, "--items", str(order.items), "--seed", str(order.seed)]
    _module(python, SUITES[order.suite].maker, [str(out.resolve()), *arguments], lambda line: on_item(line["item"]))


def judge_all(out: Path, python: Path, on_item: Callable[[str], None]) -> None:
    """Judges what is recorded and not judged. Raises EvaluationError."""
    if waiting(out):
        _module(python, "evaluation.duplex.judge", [str(out.resolve())], lambda line: on_item(line["judged"]))


def check_judges(python: Path) -> None:
    """Before an hour of conversations is held. Raises EvaluationError if there is nobody to judge them."""
    if not python.exists():
        raise EvaluationError(f"there is no {python}: {SETUP}")
    check = [str(python), "-m", "evaluation.duplex.judge", "--check", "."]
    if subprocess.run(check, cwd=REPOSITORY, check=False).returncode:
        raise EvaluationError(f"judges are missing in {python.parents[1]}: {SETUP}")


def to_hold(out: Path) -> list[Path]:
    """The items without a recording."""
    return [folder for folder in item_folders(out / "items") if not (folder / RECORDING).exists()]


async def hold_all(
    folders: Sequence[Path],
    server: str,
    *,
    sessions: int,
    key: str | None,
    on_second: Callable[[str, float], None],
    on_end: Callable[[str, str | None], None],
) -> None:
    """Holds the conversations, some at a time, in real time. What goes wrong with one is written beside it.

    on_second gets an item's name and how long it lasts so far, on_end its name and what went wrong, if anything did.
    """
    waiting_line = asyncio.Semaphore(sessions)

    async def hold(folder: Path) -> None:
        async with waiting_line:
            why: str | None = None
            try:
                await record(server, folder, key=key, on_second=lambda now_s: on_second(folder.name, now_s))
                (folder / FAILURE).unlink(missing_ok=True)
            except (ItemError, NotLive, ChatFailed, WireError, ValueError) as error:
                why = str(error)
                write_json(folder / FAILURE, {"why": why})
            on_end(folder.name, why)

    await asyncio.gather(*(hold(folder) for folder in folders))


def _module(python: Path, module: str, arguments: Sequence[str], on_line: Callable[[dict[str, Any]], None]) -> None:
    """Runs a module in the judges' environment and hands on the JSON it prints, line by line."""
    command = [str(python), "-m", module, *arguments]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                on_line(json.loads(line))
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode == NO_JUDGES:
        raise EvaluationError(SETUP)
    if process.returncode:
        raise EvaluationError(f"{module} failed; what it said is above. The same command goes on from here")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error
    return raw

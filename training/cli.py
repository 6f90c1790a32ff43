"""`personaplex train …`: the stages of training, each resumable, and what they have reached so far."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from training.amounts import SAID_AGAIN, SPOKEN
from training.folders import FROZEN, REPOSITORY, Log, state_folder
from training.setup_env import VENV

app = typer.Typer(
    name="train",
    no_args_is_help=True,
    help="Train the small demo model: data → hearing → freeze → codes → lm and codec → export. Every stage resumes.",
)

Minutes = Annotated[float, typer.Option(help="Length of this piece in minutes; 0: until the stage is done.")]
Dialogues = Annotated[int, typer.Option(help="How many dialogues of the plan.")]
PlanName = Annotated[
    str, typer.Option(help="first (4 voices, 3 roles), roles (all roles), wide (all), readings or counter.")
]
Threads = Annotated[int, typer.Option(help="Threads on a CPU.")]


def _stage(module: str, *arguments: str, heavy: bool = False) -> None:
    """Runs a stage as a process of its own; `heavy` ones need the packages of `train setup`."""
    prepared = VENV / "bin" / "python"
    if heavy and not prepared.exists():
        raise typer.BadParameter("this stage synthesises or judges speech: run `personaplex train setup` first")
    python = str(prepared if heavy else sys.executable)
    done = subprocess.run([python, "-m", f"training.{module}", *arguments], cwd=REPOSITORY, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


@app.command()
def setup() -> None:
    """Make .venv-train with the packages that data and judges need."""
    _stage("setup_env")


@app.command()
def data(plan: PlanName = "first", dialogues: Dialogues = 600, workers: int = 2) -> None:
    """Speak the scripts, render stereo dialogues, pack speech for the codec."""
    _stage("bank", "--plan", plan, "--dialogues", str(dialogues), "--workers", str(workers), heavy=True)
    _stage("dialogues", "--plan", plan, "--dialogues", str(dialogues), heavy=True)
    _stage("pack", heavy=True)


@app.command()
def hearing(minutes: Minutes = 0.0, threads: Threads = 1) -> None:
    """Train the codec's encoder, or go on with it."""
    _stage("hearing", "--minutes", str(minutes), "--threads", str(threads))


@app.command()
def fit(threads: Threads = 1) -> None:
    """Fit the codebooks to what the encoder hears; until `freeze`, as often as you like."""
    _stage("fit_codebooks", "--threads", str(threads))


@app.command()
def gates(minutes: Annotated[float, typer.Option(help="Minutes of held-out speech.")] = 10.0) -> None:
    """Judge the codec: word errors, voice, use of the codebooks."""
    _stage("gates", "--minutes", str(minutes), heavy=True)


@app.command()
def freeze(force: Annotated[bool, typer.Option(help="Freeze codes that have not passed.")] = False) -> None:
    """Fix the codes as they are now: dialogues are encoded with them, and `train codec` teaches their decoder."""
    folder = state_folder() / "codec"
    if not force and not _verdict(state_folder(), "codes_passed"):
        raise typer.BadParameter("these codes have not passed their gates: `personaplex train gates`, or --force")
    if not (folder / FROZEN).exists():
        step = json.loads((folder / "state.json").read_text(encoding="utf-8"))["hearing_step"]
        (folder / FROZEN).write_text(f"{step}\n", encoding="utf-8")
    typer.echo(f"frozen: {folder}")


@app.command()
def codec(minutes: Minutes = 0.0, threads: Threads = 1) -> None:
    """Train the codec's decoder, or go on with it."""
    _stage("codec", "--minutes", str(minutes), "--threads", str(threads))


@app.command()
def codes(plan: PlanName = "first", dialogues: Dialogues = 600) -> None:
    """Encode the dialogues with the frozen codec."""
    if not (state_folder() / "codec" / FROZEN).exists():
        raise typer.BadParameter("the codec still changes: `personaplex train freeze` first")
    _stage("codes", "--plan", plan, "--dialogues", str(dialogues), heavy=True)


@app.command()
def speak(workers: Annotated[int, typer.Option(help="Processes that speak.")] = 2) -> None:
    """Speak what the language model's dialogues need: some hours; to be stopped whenever there is enough."""
    for plan, dialogues in SPOKEN.items():
        _stage("bank", "--plan", plan, "--dialogues", str(dialogues), "--workers", str(workers), heavy=True)


@app.command()
def splice(workers: Annotated[int, typer.Option(help="Processes that encode utterances.")] = 2) -> None:
    """Put the language model's dialogues together from encoded utterances, as far as they are spoken."""
    for plan, dialogues in (SPOKEN | SAID_AGAIN).items():
        _stage("splice", "--plan", plan, "--dialogues", str(dialogues), "--workers", str(workers), heavy=True)


@app.command()
def lm(
    minutes: Minutes = 0.0,
    workers: Annotated[int, typer.Option(help="Threads that share every step; one per idle core.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Where the rate's cosine ends. [default: the preset's]")] = None,
) -> None:
    """Train the language model, or go on with it."""
    chosen = () if steps is None else ("--steps", str(steps))
    _stage("lm", "--minutes", str(minutes), "--workers", str(workers), *chosen)


@app.command()
def export(out: Annotated[Path | None, typer.Option(help="The checkpoint's folder.")] = None) -> None:
    """Write a checkpoint folder that `personaplex serve` loads."""
    _stage("export", *(["--out", str(out)] if out else []))


@app.command(name="all")
def everything(
    minutes: Annotated[
        float, typer.Option(help="Stop after so many minutes; 0: when the language model is done.")
    ] = 0.0,
    threads: Threads = 1,
    piece: Annotated[float, typer.Option(help="Minutes of training between two judgements of the codec.")] = 45.0,
) -> None:
    """Go on with whatever comes next, stage after stage, until the time is over."""
    end_s = time.monotonic() + minutes * 60 if minutes else float("inf")
    while (left := (end_s - time.monotonic()) / 60) > 0:
        limit = left if minutes else 0.0
        stage = next_stage(state_folder())
        typer.echo(f"next: {stage}")
        if stage == "data":
            data()
        elif stage == "hearing":
            hearing(min(piece, left), threads)
            fit(threads)
            gates(10.0)
        elif stage == "freeze":
            freeze()
        elif stage == "codes":
            codes()
            speak()
            splice()
        elif stage == "codec":
            codec(min(piece, left), threads)
            gates(10.0)
        else:
            lm(limit, threads)
            export()
            break


def next_stage(folder: Path) -> str:
    """Which stage is to be run, from what the others left in `folder`."""
    if not (folder / "pcm" / "index.json").exists():
        return "data"
    if not (folder / "codec" / FROZEN).exists():
        return "freeze" if _verdict(folder, "codes_passed") else "hearing"
    about = folder / "codes" / "about.json"
    if not (about.exists() and json.loads(about.read_text(encoding="utf-8")).get("complete", False)):
        return "codes"
    return "lm" if _verdict(folder, "passed") else "codec"


def _verdict(folder: Path, name: str) -> bool:
    """What the last judgement of the codec says."""
    path = folder / "codec" / "gates.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))[name])


@app.command()
def status() -> None:
    """What every stage has reached."""
    for line in summary(state_folder()):
        typer.echo(line)


def summary(folder: Path) -> Sequence[str]:
    """One line a stage, from the files it left."""
    speech = len(list((folder / "speech").glob("*/*.flac")))
    dialogues = len(list((folder / "dialogues").glob("*/train/*/*.flac")))
    lines = [f"speech     {speech} utterances", f"dialogues  {dialogues} for training"]
    for stage in ("hearing", "codec", "lm"):
        rows = Log(folder / stage / "log.jsonl").read()
        lines.append(f"{stage:<10} {_last(rows)}" if rows else f"{stage:<10} not begun")
    return lines


def _last(rows: list[dict[str, Any]]) -> str:
    """The newest value of each figure."""
    newest: dict[str, Any] = {}
    for row in rows:
        newest.update(row)
    shown = [f"{name} {value:.3f}" for name, value in newest.items() if isinstance(value, float) and name != "time"]
    return f"step {newest['step']}: " + ", ".join(shown)

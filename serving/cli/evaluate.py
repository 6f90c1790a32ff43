"""`personaplex evaluate`: conversations with a scripted user, judged; what the agent did right, and what it did not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import WRONG_USE, err, fail, introduce, note, out

if TYPE_CHECKING:
    from rich.progress import Progress

    from evaluation.duplex.gates import Result
    from evaluation.duplex.report import Report
    from evaluation.duplex.run import Order

GATES_MISSED = 3  # everything was measured, and it is not good enough

_LONGEST_ITEM_S = 60.0  # where a conversation's bar ends; how long it lasts is up to the agent


def evaluate(
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where everything goes; the same DIR goes on where it was.")
    ],
    server: Annotated[str, typer.Option(metavar="URL", help="The server to be judged.")] = "http://localhost:8998",
    suite: Annotated[str, typer.Option(help="own: held-out dialogues of the demo model's data.")] = "own",
    items: Annotated[int, typer.Option(min=1, metavar="N", help="Conversations.")] = 24,
    sessions: Annotated[int, typer.Option(min=1, metavar="N", help="Conversations at once, in real time.")] = 2,
    plan: Annotated[str, typer.Option(help="first: 3 roles, 4 voices; wide: all. What the model was trained on.")] = (
        "first"
    ),
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Another seed, other dialogues.")] = 0,
    key: Annotated[str | None, typer.Option(envvar="PERSONAPLEX_KEY", help="API key of the server.")] = None,
    judges: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="Where the judges are.", show_default=".venv-train/bin/python")
    ] = None,
) -> None:
    """Talk to a server as a user who reacts, and judge how it converses.

    Does it take its turn, stop when interrupted, wait through a pause,
    say what its text says, know its role's facts, keep its voice? Items
    are made, held over /api/chat in real time, and judged; DIR gets
    report.html, report.json and every recording. Stop it whenever you
    like: the same command goes on. The judges (Whisper, Silero,
    pocketsphinx, Resemblyzer) come with `personaplex train setup`.

    Exit status: 0 all gates met, 3 some are not, 1 it could not be done.

    \b
      personaplex evaluate --out out/evaluation
      personaplex evaluate --out out/quick --items 4 --sessions 4
      personaplex evaluate --server https://host:8998 --key ppx_... --out out/host
    """
    from evaluation.duplex.items import ItemError
    from evaluation.duplex.report import REPORT_HTML, read_report, write_report
    from evaluation.duplex.run import JUDGES_PYTHON, EvaluationError, Order, check_judges, open_run
    from evaluation.duplex.suites import SUITES

    if suite not in SUITES:
        fail(f"there is no suite {suite!r}; there is {', '.join(SUITES)}", WRONG_USE)
    if plan not in SUITES[suite].plans:
        fail(f"suite {suite} has no plan {plan!r}; it has {', '.join(SUITES[suite].plans)}", WRONG_USE)
    python = judges or JUDGES_PYTHON
    order = Order(suite, plan, items, seed)
    try:
        check_judges(python)
        open_run(folder, order)
        _make(folder, order, python)
        _hold(folder, server, sessions, key)
        _judge(folder, python)
        report = read_report(folder)
        write_report(folder, report)
    except (EvaluationError, ItemError) as error:
        fail(str(error))
    _print(report)
    out.print(f"{folder / REPORT_HTML}", highlight=False, soft_wrap=True)
    if report.not_held:
        fail(f"{len(report.not_held)} of {items} conversations could not be judged; the same command tries them again")
    if report.gates_missed:
        raise typer.Exit(GATES_MISSED)


def _make(folder: Path, order: Order, python: Path) -> None:
    from evaluation.duplex.run import make_items

    with _progress("{task.completed:.0f} of {task.total:.0f}") as progress:
        bar = progress.add_task("making items", total=order.items)
        make_items(folder, order, python, lambda _: progress.advance(bar))


def _hold(folder: Path, url: str, sessions: int, key: str | None) -> None:
    from evaluation.duplex.run import enter_server, hold_all, meet_server, to_hold

    folders = to_hold(folder)
    if not folders:
        return
    server = meet_server(url, key)
    enter_server(folder, server)
    introduce(server.trained, server.notice)
    with _progress("{task.fields[shown]}") as progress:
        every = progress.add_task("conversations", total=len(folders), shown=f"0 of {len(folders)}")
        bars = {
            path.name: progress.add_task(path.name, total=_LONGEST_ITEM_S, visible=False, shown="") for path in folders
        }

        def talk(name: str, now_s: float) -> None:
            shown_s = min(now_s, _LONGEST_ITEM_S)
            progress.update(bars[name], completed=shown_s, visible=True, shown=f"{now_s:.0f} s")

        def end(name: str, why: str | None) -> None:
            progress.update(bars[name], visible=False)
            progress.advance(every)
            done = sum(1 for task in progress.tasks[1:] if task.completed and not task.visible)
            progress.update(every, shown=f"{done} of {len(folders)}")
            if why is not None:
                note(f"{name} could not be held: {why}")
            elif not err.is_terminal:
                note(f"{name} held, {done} of {len(folders)}")

        asyncio.run(hold_all(folders, server.url, sessions=sessions, key=key, on_second=talk, on_end=end))


def _judge(folder: Path, python: Path) -> None:
    from evaluation.duplex.judge import waiting
    from evaluation.duplex.run import judge_all

    todo = len(waiting(folder))
    with _progress("{task.completed:.0f} of {task.total:.0f}") as progress:
        bar = progress.add_task("judging", total=todo)
        judge_all(folder, python, lambda _: progress.advance(bar))


@contextmanager
def _progress(figures: str) -> Iterator[Progress]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(figures), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield progress


def _print(report: Report) -> None:
    from rich.table import Table

    table = Table(
        title=f"{len(report.judged)} conversations with {report.model}",
        title_justify="left",
        caption="a gate has to be met, a goal is to be reached; void: nothing could be measured",
        caption_justify="left",
    )
    for name in ("", "found", "wanted", "n", "void", ""):
        table.add_column(name, justify="left" if not name else "right")
    for result in report.results:
        colour = "green" if result.passed else "red" if result.gate.tier == "gate" else "yellow"
        table.add_row(
            result.gate.name,
            f"[{colour}]{_share(result)}[/{colour}]",
            f"{'≤' if result.gate.measure is None else '≥'} {result.gate.limit:.0%}",
            str(result.n),
            str(result.void),
            f"[{colour}]{'met' if result.passed else 'missed'}[/{colour}]  {result.gate.tier}",
        )
    out.print(table)


def _share(result: Result) -> str:
    return "no figure" if result.share is None else f"{result.share:.0%}"

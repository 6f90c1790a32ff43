"""`personaplex loadtest`: many conversations with a server at once, measured where they are heard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import FAILED, WRONG_USE, err, fail, note, out

if TYPE_CHECKING:
    from loadtest.load import CallRecord, LoadPlan
    from loadtest.report import LoadReport, Spread
    from loadtest.speech import Samples

INVALID = 3  # the generator was late: no statement about the server can be made

RAMP_PER_CALL_S = 0.1  # by default; all at once would measure how prompts queue up


def loadtest(
    url: Annotated[str, typer.Argument(metavar="URL", help="A running server, e.g. http://localhost:8998.")],
    sessions: Annotated[int, typer.Option("--sessions", "-n", min=1, help="Conversations at once.")] = 4,
    seconds: Annotated[
        float,
        typer.Option("--seconds", "-s", min=1, help="How long they talk after the last was dialled."),
    ] = 60.0,
    ramp: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds over which they are dialled.", show_default="0.1 for each session"),
    ] = None,
    speech: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Recording that callers play, over and over. Repeatable, in turn.",
            show_default="four callers",
        ),
    ] = None,
    voice: Annotated[
        list[str] | None,
        typer.Option(help="Voice of the agent. Repeatable: callers take them in turn.", show_default="the server's"),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT|@FILE", help="Who the agent is to be. Repeatable, in turn.", show_default="the callers' own"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first call; each one after it has the next number.")] = 0,
    key: Annotated[str | None, typer.Option(envvar="PERSONAPLEX_KEY", help="API key of the server.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Generators that share the calls.", show_default="one for 100 calls")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="A picture of the frame gaps.")] = None,
) -> None:
    """Hold many conversations at once and measure what their callers hear.

    Every caller is a full-duplex WebSocket client on an 80 ms clock.
    Reported are time to ready and to first audio, the gaps between frames
    (80 ms is the beat), how often a player with 120 ms in hand would have
    run dry, refusals and closes by code, and how late the generator
    itself was.

    Exit status: 0 all calls were held; 1 some were refused or lost;
    3 the run is invalid, because the generator was late (p99 above
    20 ms): use more --processes, or another machine.

    \b
      personaplex loadtest http://localhost:8998 --sessions 4 --seconds 60
      personaplex loadtest http://localhost:8998 -n 32 -s 300 --json
      personaplex loadtest URL -n 8 --speech question.wav --voice NATM1 --plot gaps.png
    """
    from loadtest.chat_wire import ChatOptions, chat_url
    from loadtest.generators import GeneratorDied, run_load
    from loadtest.load import LoadPlan
    from loadtest.report import LoadReport

    recordings, roles = _what_is_said(speech or [], role or [])
    plan = LoadPlan(
        server=url,
        sessions=sessions,
        seconds=seconds,
        speech=recordings,
        ramp_s=RAMP_PER_CALL_S * sessions if ramp is None else ramp,
        voices=tuple(voice or [""]),
        roles=roles,
        seed=seed,
        key=key,
    )
    try:
        chat_url(url, ChatOptions())
    except ValueError as error:
        fail(str(error), WRONG_USE)
    try:
        with _progress(plan) as on_progress:
            records = run_load(plan, processes, on_progress)
    except GeneratorDied as error:
        fail(str(error))
    report = LoadReport.of(records)
    if plot is not None:
        _draw(plot, records, plan)
    if as_json:
        print(json.dumps(report.as_json()))  # the plain print: rich would wrap and colour it
    else:
        _print(report)
    _exit(report)


def _what_is_said(files: list[Path], roles: list[str]) -> tuple[tuple[Samples, ...], tuple[str, ...]]:
    """What the callers say and whom they expect: as given, else those of the callers that ship."""
    from loadtest.callers import CALLERS
    from loadtest.speech import UnreadableAudio, read_speech
    from serving.cli.talk import read_role

    expected = tuple(read_role(role) for role in roles)
    if not files:
        return tuple(caller.speech() for caller in CALLERS), expected or tuple(each.role for each in CALLERS)
    try:
        return tuple(read_speech(file) for file in files), expected or ("",)
    except UnreadableAudio as error:
        fail(str(error), WRONG_USE)


@contextmanager
def _progress(plan: LoadPlan) -> Iterator[Callable[[list[int]], None]]:
    """A line on a terminal's stderr: how many calls are up, over and failed, and what they have heard."""
    from loadtest.load import Count
    from loadtest.speech import FRAME_S

    with err.status(f"dialling {plan.sessions} calls") as status:

        def show(totals: list[int]) -> None:
            minutes = totals[Count.FRAMES] * FRAME_S / 60
            status.update(
                f"{totals[Count.UP]} of {plan.sessions} calls are up, {totals[Count.OVER]} over, "
                f"{totals[Count.FAILED]} failed; {minutes:.1f} minutes heard"
            )

        yield show


def _draw(path: Path, records: list[CallRecord], plan: LoadPlan) -> None:
    from loadtest.load_picture import gaps_over_time

    try:
        gaps_over_time(path, records, f"{plan.sessions} conversations with {plan.server}")
    except OSError as error:
        fail(f"the picture cannot be written: {error}")


def _print(report: LoadReport) -> None:
    from rich.table import Table

    table = Table(
        title=f"{report.sessions} conversations, {report.frames} frames heard",
        title_justify="left",
        caption="milliseconds; a frame gap of 80 is the beat",
        caption_justify="left",
    )
    table.add_column("")
    for name in ("p50", "p95", "p99", "max"):
        table.add_column(name, justify="right")
    rows: tuple[tuple[str, Spread | None], ...] = (
        ("time to ready", report.ready_ms),
        ("to first audio", report.first_audio_ms),
        ("frame gap", report.frame_gap_ms),
        ("reply", report.reply_ms),
        ("generator lag", report.generator_lag_ms),
    )
    for name, spread in rows:
        table.add_row(name, *("-" if spread is None else f"{value:.1f}" for value in _values(spread)))
    out.print(table)
    out.print(f"underruns of a 120 ms playout buffer: {report.underruns}", highlight=False)
    for what, codes in (("refused", report.refusals), ("closed by the server", report.closes)):
        if codes:
            out.print(f"{what}: " + ", ".join(f"{count} × {code}" for code, count in codes.items()), highlight=False)


def _values(spread: Spread | None) -> tuple[float, ...]:
    return (0.0,) * 4 if spread is None else (spread.p50, spread.p95, spread.p99, spread.max)


def _exit(report: LoadReport) -> None:
    from loadtest.report import LATE_MS

    for sentence in report.sentences:
        note(sentence.replace("[", "\\["))
    if report.was_late and report.generator_lag_ms is not None:
        fail(
            f"this run is invalid: the generator was up to {report.generator_lag_ms.p99:.1f} ms late (p99; "
            f"{LATE_MS:g} are allowed); give it more --processes or a machine of its own",
            INVALID,
        )
    if not report.all_held:
        fail(f"{sum(report.refusals.values())} calls were refused, {sum(report.closes.values())} lost", FAILED)

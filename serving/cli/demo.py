"""`personaplex demo`: the whole system on this machine, four conversations at once, and what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.console import err, fail, introduce, out
from serving.cli.options import CHECKPOINT_HELP
from serving.cli.serve import running, settings_from

if TYPE_CHECKING:
    from rich.progress import Progress

    from loadtest.callers import Caller
    from loadtest.chat_client import Conversation
    from loadtest.speech import Recording

FIRST_SEED = 20

HEADERS = ("time to\nready", "to first\naudio", "gap\np50", "gap\np99", "reply\np50", "real-time\nfactor")


@dataclass(frozen=True)
class Call:
    """One conversation of the demo: who calls, whom they reach, and what came of it."""

    caller: Caller
    recording: Recording
    voice: str
    seed: int
    held: Conversation | None = None
    failure: str | None = None


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where the recordings and the picture go.")] = Path("out"),
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", help=CHECKPOINT_HELP)] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Call a running server instead of starting one.")
    ] = None,
) -> None:
    """Start the system, hold four conversations at once, stop it.

    Four recorded callers talk over real WebSockets, each to another voice
    in another role, on the 80 ms clock of the model. Prints how live each
    of them was, and writes a stereo recording of each (caller left, agent
    right) and a picture of who spoke when. Exits with an error if a
    conversation failed or fell behind real time.

    \b
      personaplex demo
      personaplex demo --server http://localhost:8998
    """
    from loadtest.callers import CALLERS

    if server is not None:
        calls = _hold_all(server, CALLERS)
    else:
        # A free port: the demo does not get in the way of a server that is already running.
        settings = settings_from(checkpoint=checkpoint, device=device, slots=len(CALLERS), port=0)
        with running(settings) as url:
            calls = _hold_all(url, CALLERS)
    _write(calls, folder)
    _print(calls, folder)
    wrong = [f"{call.caller.name}: {reason}" for call in calls if (reason := what_was_wrong(call))]
    if wrong:
        fail("; ".join(wrong))


def _hold_all(url: str, callers: Sequence[Caller]) -> list[Call]:
    import httpx
    from rich.progress import BarColumn, Progress, TextColumn

    try:
        voices = [voice["id"] for voice in _listed(url, "voices")]
        models = _listed(url, "models")
    except (httpx.HTTPError, KeyError, ValueError) as error:
        fail(f"{url} does not answer as our server would: {error}")
    if not voices:
        fail("this checkpoint has no voices; add one with personaplex voices add")
    for model in models:
        introduce(model.get("trained"), str(model.get("notice", "")))
    calls = [
        Call(caller, caller.recording(), voices[i * len(voices) // len(callers)], FIRST_SEED + i)
        for i, caller in enumerate(callers)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} s"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        return asyncio.run(_converse(url, calls, progress))


def _listed(url: str, what: str) -> list[dict[str, Any]]:
    import httpx

    answer = httpx.get(f"{url}/v1/{what}", timeout=10.0)
    answer.raise_for_status()
    data = answer.json()["data"]
    assert isinstance(data, list)
    return data


async def _converse(url: str, calls: Sequence[Call], progress: Progress) -> list[Call]:
    def bar(call: Call) -> Callable[[int], None]:
        task = progress.add_task(f"{call.caller.name} talks to {call.voice}", total=call.recording.seconds)
        return lambda frames: progress.update(task, completed=frames * 0.08)

    return list(await asyncio.gather(*(_hold(url, call, bar(call)) for call in calls)))


async def _hold(url: str, call: Call, on_frame: Callable[[int], None]) -> Call:
    from loadtest.chat_client import ChatFailed, hold_conversation
    from loadtest.chat_wire import ChatOptions, WireError

    options = ChatOptions(voice=call.voice, role=call.caller.role, seed=call.seed)
    try:
        held = await hold_conversation(url, call.recording, options, on_frame=on_frame)
    except (ChatFailed, WireError) as error:
        return Call(call.caller, call.recording, call.voice, call.seed, failure=str(error))
    return Call(call.caller, call.recording, call.voice, call.seed, held=held)


def what_was_wrong(call: Call) -> str | None:
    """One clause, or None if the call was live to its end."""
    if call.held is None:
        return call.failure or "no conversation"
    if len(call.held.agent) < len(call.recording.pcm):
        return f"heard {len(call.held.agent)} of {len(call.recording.pcm)} samples"
    if not call.held.timings.was_real_time:
        return f"not in real time: a second took {call.held.timings.real_time_factor:.2f} s"
    return None


def _write(calls: Sequence[Call], folder: Path) -> None:
    from loadtest.pictures import Lane, who_spoke_when
    from loadtest.speech import write_wav

    lanes = []
    for number, call in enumerate(calls, start=1):
        if call.held is None:
            continue
        write_wav(folder / f"conversation-{number}.wav", call.recording.pcm, call.held.agent)
        factor = call.held.timings.real_time_factor
        note_ = f"voice {call.voice} · seed {call.seed} · real-time factor {factor:.2f}"
        lanes.append(Lane(f"{number}  {call.caller.name}", note_, call.recording.pcm, call.held.agent))
    if lanes:
        who_spoke_when(folder / "who-spoke-when.png", lanes, heading_of(calls))


def heading_of(calls: Sequence[Call]) -> str:
    """Says whom they talked to: a picture is shown where nobody reads what was printed beside it."""
    held = [call.held.metadata for call in calls if call.held is not None]
    heading = f"{len(held)} conversations at once"
    if any(told.get("trained") is False for told in held):
        return f"{heading}, the agents babbling: their weights are random"
    models = sorted({str(told["lm_model_file"]) for told in held if told.get("lm_model_file")})
    return f"{heading} with {' and '.join(models)}" if models else heading


def _print(calls: Sequence[Call], folder: Path) -> None:
    from rich.table import Table

    from loadtest.timings import percentile

    table = Table(
        title=f"{len(calls)} conversations at once",
        title_justify="left",
        caption="milliseconds; gap: from frame to frame, 80 is the beat; factor 1.00 is live",
        caption_justify="left",
    )
    for name in ("caller", "voice"):
        table.add_column(name)
    for name in HEADERS:
        table.add_column(name, justify="right")
    for call in calls:
        if call.held is None:
            table.add_row(call.caller.name, call.voice, "[red]failed[/red]")
            continue
        times = call.held.timings
        factor = times.real_time_factor or 0.0
        colour = "green" if times.was_real_time else "red"
        table.add_row(
            call.caller.name,
            call.voice,
            f"{(times.time_to_ready_s or 0.0) * 1e3:.0f}",
            f"{(times.time_to_first_audio_s or 0.0) * 1e3:.0f}",
            f"{percentile(times.frame_gaps_ms, 0.5):.0f}",
            f"{percentile(times.frame_gaps_ms, 0.99):.0f}",
            f"{percentile(times.reply_lags_ms, 0.5):.0f}",
            f"[{colour}]{factor:.3f}[/{colour}]",
        )
    out.print(table)
    out.print(f"{folder}/conversation-1.wav …  caller left, agent right", highlight=False)
    out.print(f"{folder}/who-spoke-when.png", highlight=False)

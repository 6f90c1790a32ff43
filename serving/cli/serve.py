"""`personaplex serve`: the whole system on this machine, until Ctrl-C."""

from __future__ import annotations

import atexit
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.console import WRONG_USE, err, fail, introduce, out
from serving.cli.options import Accelerator, Checkpoint, Host, KeysFile, Slots

if TYPE_CHECKING:
    from serving.settings import ServeSettings


def serve(
    checkpoint: Checkpoint = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 picks a free one.", show_default="8998")] = None,
    host: Host = None,
    slots: Slots = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the language model: auto, float32 or bfloat16.", show_default="auto: bfloat16"),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            help="What computes attention: auto, ours or vllm.", show_default="auto: the fastest that is right"
        ),
    ] = None,
    linear_backend: Annotated[
        str | None,
        typer.Option(
            help="What multiplies matrices: auto, ours, int8, onednn, vllm, vllm-int8 or vllm-fp8.",
            show_default="auto: the fastest that is right",
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help="Keys and values: auto, bfloat16, or fp8 (CUDA), which holds about twice the calls.",
            show_default="auto: as computed",
        ),
    ] = None,
    kv_overcommit: Annotated[
        float | None,
        typer.Option(
            help="1: each slot has the memory of a full context. 1.5: three slots share that of two, and calls move "
            "to another replica when it runs short.",
            show_default="1",
        ),
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas autoscaling may start.", show_default="1")
    ] = None,
    accelerator: Accelerator = None,
    keys_file: KeysFile = None,
    opus_complexity: Annotated[
        int | None, typer.Option(help="The Opus encoder's effort, 0 to 10.", show_default="5")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Where traces and metrics go (OTLP over HTTP).", show_default="nowhere")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.", show_default="WARNING")
    ] = None,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print every setting with its default, and leave.")
    ] = False,
) -> None:
    """Start Ray and the server on this machine and print where to talk.

    Every setting, these and the rarer ones (--list-settings), can also
    come from the environment as PERSONAPLEX_NAME; what is given here
    wins. Ctrl-C ends the conversations and stops everything.

    \b
      personaplex serve
      personaplex serve --port 9000 --slots 8
      personaplex serve --checkpoint nvidia/personaplex-7b-v1 --kv-dtype fp8
      personaplex serve --host 0.0.0.0 --keys-file keys.toml
      PERSONAPLEX_IDLE_TIMEOUT_S=600 personaplex serve
    """
    if list_settings:
        _print_settings()
        return
    settings = settings_from(
        checkpoint=checkpoint,
        port=port,
        host=host,
        slots=slots,
        device=device,
        dtype=dtype,
        attention_backend=attention_backend,
        linear_backend=linear_backend,
        kv_dtype=kv_dtype,
        kv_overcommit=kv_overcommit,
        max_replicas=max_replicas,
        accelerator=accelerator,
        keys_file=keys_file,
        opus_complexity=opus_complexity,
        otlp_endpoint=otlp_endpoint,
        log_level=log_level,
    )
    from models.checkpoint import CheckpointError, load_checkpoint
    from serving.tenants import KeysFileError, Tenants

    try:
        Tenants.load(settings.keys_file)
        loaded = load_checkpoint(settings.checkpoint, parts=frozenset())
    except (CheckpointError, KeysFileError) as error:
        fail(str(error))
    with running(settings) as url:
        # After Ray's start, which installs handlers of its own.
        wait_for_stop = catch_stop_signals()
        _say_where(url, loaded.name, settings)
        introduce(loaded.trained, loaded.notice, out)
        out.print("[dim]Ctrl-C stops it.[/dim]")
        wait_for_stop()


def catch_stop_signals() -> Callable[[], None]:
    """From now on SIGINT and SIGTERM only make the returned function return, for as long as the process lives: a
    second Ctrl-C must not cut the stopping short either.

    A handler runs between any two instructions of the main thread, its own included: with an Event, whose lock is not
    reentrant, a Ctrl-C on the heels of another was the last thing the server did. And the signal may arrive in one of
    Ray's threads, which wakes nobody. So it is written to a pipe, by number, by whichever thread it reaches.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # a key held down fills the pipe, and may not hold us
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    stopping = (signal.SIGINT, signal.SIGTERM)
    for number in stopping:
        signal.signal(number, lambda *_: None)
        # The interpreter, when it ends, puts the default in place of handlers of ours, but leaves what is ignored.
        atexit.register(signal.signal, number, signal.SIG_IGN)

    def wait() -> None:
        while os.read(reading, 1)[0] not in stopping:
            pass

    return wait


@contextmanager
def running(settings: ServeSettings) -> Iterator[str]:
    """The whole system on this machine for a block; gives its URL, or one clear sentence if it does not start."""
    from serving.local import LocalStartError, start_local
    from serving.plan import PlanError

    try:
        with err.status("starting Ray and the server"):
            server = start_local(settings)
    except (LocalStartError, PlanError) as error:
        fail(str(error))
    try:
        yield server.url
    finally:
        # Ray's driver prints to stdout, whatever its log level, that what it is killing has died.
        with err.status("stopping"), redirect_stdout(io.StringIO()):
            server.stop()


def settings_from(**given: Any) -> ServeSettings:
    """Settings with what was given on the command line over the environment; one clear sentence if they are wrong."""
    from pydantic import ValidationError

    from serving.settings import ServeSettings

    try:
        return ServeSettings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fail("; ".join(_sentence(problem) for problem in error.errors()), WRONG_USE)


def _sentence(problem: Any) -> str:
    what = str(problem["msg"]).removeprefix("Value error, ")
    where = "".join(str(part) for part in problem["loc"][:1])  # what follows are names of pydantic's own
    return f"--{where.replace('_', '-')}: {what}" if where else what


def _say_where(url: str, name: str, settings: ServeSettings) -> None:
    out.print(f"[bold]Talk at {url}[/bold]", highlight=False)
    slots = "as many conversations as fit" if settings.slots == "auto" else f"{settings.slots} conversations at once"
    out.print(f"  {name}, {slots} on {settings.device}", highlight=False)
    out.print(f"  personaplex talk in.wav out.wav --server {url}", highlight=False)


def _print_settings() -> None:
    from rich.table import Table

    from serving.settings import ServeSettings

    table = Table(title="Settings, from the environment as PERSONAPLEX_NAME", title_justify="left")
    for column in ("name", "default", "meaning"):
        table.add_column(column)
    for name, field in ServeSettings.model_fields.items():
        table.add_row(name, str(field.default), field.description or "")
    out.print(table)

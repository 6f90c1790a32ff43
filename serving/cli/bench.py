"""`personaplex bench`: what a frame costs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serving.cli.console import WRONG_USE, err, fail, out

if TYPE_CHECKING:
    from benchmarks.frame import FrameRow

app = typer.Typer(
    help="Measure this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def measure() -> None:
    """Measure this machine."""


# `--slots 1 4 16`: an option takes one value, so 4 and 16 are left over.
@app.command(context_settings={"allow_extra_args": True})
def frame(
    context: typer.Context,
    slots: Annotated[
        list[str] | None, typer.Option("--slots", metavar="N…", help="Conversations at once.", show_default="1 4 16")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch, on a CPU. The server's actors have one each.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: Annotated[
        str, typer.Option(help="Which model's shape: demo, 7b, or a folder with a config.json. Weights are random.")
    ] = "demo",
    contexts: Annotated[
        list[int] | None,
        typer.Option(
            "--context",
            min=1,
            metavar="N",
            help="Frames that each conversation holds already; repeatable.",
            show_default="10, 50 and 100 % of the window",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON and nothing else.")] = False,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture here.")] = None,
) -> None:
    """Milliseconds of one 80 ms frame: encode, frame step, decode.

    Beside the step stands its roofline: the bytes it has to read, over
    the copy bandwidth of this device. The ratio says how many times as
    long as that the step takes. Prefill is a step in which one of the
    slots also reads 64 frames of its prompt. All figures are medians of
    the model's code alone, without Ray or network, on random weights.

    \b
      personaplex bench frame
      personaplex bench frame --slots 1 4 16 --threads 1 --device cpu --json --plot frame.png
      personaplex bench frame --checkpoint 7b --slots 32 --device cuda
    """
    more = context.args
    if more and not slots:
        fail(f"what is {more[0]!r}? numbers of slots come after --slots", WRONG_USE)
    counts = _numbers([*(slots or ["1", "4", "16"]), *more])

    import torch

    from benchmarks.frame import FrameBench, default_contexts
    from benchmarks.frame_plot import plot
    from benchmarks.setting import pick_device, shapes_of
    from graphs.backends import default_dtype

    try:
        chosen = pick_device(device)
        lm, mimi = shapes_of(checkpoint)
    except ValueError as error:
        fail(str(error), WRONG_USE)
    held = sorted({min(frames, lm.window) for frames in contexts or default_contexts(lm)})
    torch.set_num_threads(threads)
    rows: list[FrameRow] = []
    with err.status("measuring") as status:
        bench = FrameBench(lm, mimi, chosen, default_dtype(chosen))
        for count in counts:
            status.update(f"measuring {count} slots")
            rows += bench.measure(count, held)
    if as_json:
        # The plain print: rich would wrap and colour it.
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        _print_table(rows)
    if plot_file:
        plot([row.as_dict() for row in rows], plot_file)


@app.command()
def capacity(
    checkpoint: Annotated[
        str, typer.Option(help="Which model's shape: demo, 7b, or a folder with a config.json. Weights are random.")
    ] = "demo",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch, on a CPU. The server's actors have one each.")
    ] = 1,
    frames: Annotated[int, typer.Option(min=2, help="Frames measured for each number of conversations.")] = 300,
    limit: Annotated[int, typer.Option(min=1, help="Never try more conversations than this.")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the rows here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture here.")] = None,
) -> None:
    """The most conversations this machine holds, contexts full, p99 of a frame under 80 ms.

    Encode, frame step and decode run one after the other, as they do
    where they share a processor or a GPU; the codec is at work and
    sampling is on. Without Ray or network, on random weights.

    \b
      personaplex bench capacity
      personaplex bench capacity --checkpoint 7b --device cuda --json capacity.json --plot capacity.png
    """
    from benchmarks.capacity import main

    given = ["--shape", checkpoint, "--device", device, "--threads", threads, "--frames", frames, "--limit", limit]
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        given += [option, file] if file else []
    raise typer.Exit(main([str(value) for value in given]))


def _numbers(values: list[str]) -> list[int]:
    counts: list[int] = []
    for value in ",".join(values).replace(" ", ",").split(","):
        if not value:
            continue
        if not value.isdecimal() or int(value) < 1:
            fail(f"--slots wants whole numbers from 1 on, not {value!r}", WRONG_USE)
        counts.append(int(value))
    return counts


def _print_table(rows: list[FrameRow]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = rows[0]
    table = Table(
        title=f"One frame on {first.device}, {first.dtype}, {first.threads} thread(s), {first.bandwidth_gb_s:.0f} GB/s",
        title_justify="left",
        caption="ms, medians; the budget of all three together is 80 ms a frame",
        caption_justify="left",
        box=SIMPLE_HEAD,  # all columns fit into 80 characters
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("slots", "context", "encode", "prefill", "step", "roofline", "ratio", "decode", "together"):
        table.add_column(name, justify="right")
    for row in rows:
        colour = "green" if row.real_time else "red"
        table.add_row(
            str(row.slots),
            str(row.context_frames),
            f"{row.encode_ms:.1f}",
            f"{row.prefill_ms:.1f}",
            f"{row.step_ms:.1f}",
            f"{row.roofline_ms:.1f}",
            f"{row.ratio:.1f}",
            f"{row.decode_ms:.1f}",
            f"[{colour}]{row.frame_ms:.1f}[/{colour}]",
        )
    out.print(table)

"""The command `personaplex`. One file per command; whatever is heavy is imported when a command runs."""

from __future__ import annotations

import typer

from serving.cli import bench, demo, deploy, drain, evaluate, keys, loadtest, replicas, serve, talk, voices
from training.cli import app as train

app = typer.Typer(
    name="personaplex",
    help=(
        "Serve NVIDIA PersonaPlex: live, full-duplex conversations, many to a GPU.\n\n"
        "[bold]Begin here[/bold]\n\n"
        "  personaplex demo                 four conversations at once\n\n"
        "  personaplex serve                then talk at http://localhost:8998\n\n"
        "  personaplex talk in.wav out.wav  let the agent answer a recording\n\n"
        "[bold]On a GPU, with the real weights[/bold]\n\n"
        "  personaplex serve --checkpoint nvidia/personaplex-7b-v1 --slots 32"
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("serve")(serve.serve)
app.command("talk")(talk.talk)
app.command("demo")(demo.demo)
app.command("deploy")(deploy.deploy)
app.command("drain")(drain.drain)
app.command("evaluate")(evaluate.evaluate)
app.command("keys")(keys.keys)
app.command("loadtest")(loadtest.loadtest)
app.command("replicas")(replicas.replicas)
app.add_typer(voices.app, name="voices")
app.add_typer(bench.app, name="bench")
app.add_typer(train, name="train")

if __name__ == "__main__":
    app()

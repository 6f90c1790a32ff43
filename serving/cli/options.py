"""Options that commands share: one name, one help text, one default to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT_HELP = "Folder, Hugging Face repository, demo, or demo-random."

Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", "-c", help=CHECKPOINT_HELP, show_default="demo"),
]
Host = Annotated[
    str | None,
    typer.Option(help="Address to bind. Beyond loopback, --keys-file is required.", show_default="127.0.0.1"),
]
Slots = Annotated[
    str | None,
    typer.Option(help="Conversations a replica holds at once; auto: what fits.", show_default="auto, 4 on a CPU"),
]
Accelerator = Annotated[
    str | None, typer.Option(help="What a replica asks Ray for: H100, none, auto.", show_default="auto")
]
KeysFile = Annotated[
    Path | None, typer.Option(help="API keys with their tenants' limits.", show_default="none: open on loopback")
]

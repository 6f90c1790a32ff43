"""Options that commands share: one name, one help text, one default to show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CHECKPOINT_HELP = "Folder, Hugging Face repository, demo (the small model that ships) or demo-random."

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
    typer.Option(
        help="Conversations that a replica holds at once; auto: what the GPU's memory holds.",
        show_default="auto; on a CPU 4",
    ),
]
Accelerator = Annotated[
    str | None,
    typer.Option(
        help="GPU that a replica asks Ray for: a type such as H100, or none.",
        show_default="auto: H100 on CUDA, else none",
    ),
]
KeysFile = Annotated[
    Path | None, typer.Option(help="API keys with their tenants' limits.", show_default="none: open on loopback")
]

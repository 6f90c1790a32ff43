"""How the commands speak to whoever typed them: results on stdout, everything else on stderr."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

FAILED = 1  # what was asked for could not be done
WRONG_USE = 2  # it was asked for wrongly

UNTRAINED = (
    "[yellow]This checkpoint has random weights: it listens and answers in real time, through every part of the real "
    "system, but it cannot speak yet. What you hear is babble.[/yellow]"
)


def introduce(trained: bool | None, notice: str, console: Console = err) -> None:
    """Says of a model what everybody who meets it is to know. trained: None where a server says nothing of itself."""
    if trained is False:
        console.print(UNTRAINED, highlight=False, soft_wrap=True)
    elif notice:
        console.print(f"[yellow]{_plain(notice)}[/yellow]", highlight=False, soft_wrap=True)


def fail(sentence: str, code: int = FAILED) -> NoReturn:
    """Ends the command with one clear sentence."""
    err.print(f"[bold red]error:[/bold red] {_plain(sentence)}", highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def note(sentence: str) -> None:
    """A line about what is going on."""
    err.print(sentence, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Rich reads [brackets] as markup; a message of somebody else's is no markup."""
    return text.replace("[", "\\[")

"""`personaplex voices`: which voices a checkpoint has, and one more made from a recording."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from serving.cli.console import WRONG_USE, fail, note, out
from serving.cli.options import CHECKPOINT_HELP

app = typer.Typer(rich_markup_mode="rich")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", help=CHECKPOINT_HELP)]


@app.callback(invoke_without_command=True)
def voices(context: typer.Context, checkpoint: CheckpointOption = "demo") -> None:
    """List the voices of a checkpoint, or add one.

    \b
      personaplex voices
      personaplex voices --checkpoint nvidia/personaplex-7b-v1
      personaplex voices add anna anna.wav --checkpoint ./my-checkpoint
    """
    if context.invoked_subcommand is not None:
        return
    from models.checkpoint import CheckpointError, load_checkpoint
    from models.voices import VoiceError

    try:
        library = load_checkpoint(checkpoint, parts=frozenset()).voices
        names = library.names()
    except (CheckpointError, VoiceError) as error:
        fail(str(error))
    if not names:
        note(f"{checkpoint} has no voices; add one: personaplex voices add NAME WAV --checkpoint FOLDER")
    for name in names:
        out.print(name, highlight=False)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Letters, digits, - and _.")],
    recording: Annotated[Path, typer.Argument(metavar="WAV", help="3 to 10 seconds of one speaker, any rate.")],
    checkpoint: CheckpointOption = "demo",
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite a voice of that name.")] = False,
) -> None:
    """Add a voice from a recording to a checkpoint's folder.

    The recording is made mono, 24 kHz and -24 LUFS and encoded by the
    checkpoint's own Mimi; its codes are stored in
    FOLDER/voices/NAME.safetensors. A server sees it when it is started
    the next time.

    \b
      personaplex voices add anna anna.wav --checkpoint ./my-checkpoint
    """
    if not _NAME.fullmatch(name):
        fail(f"{name!r} cannot be a voice's name: 1 to 64 letters, digits, - and _", WRONG_USE)
    from models.checkpoint import CheckpointError, load_checkpoint
    from models.checkpoint_files import SHIPPED_DEMO
    from models.voice_recording import voice_from_wav
    from models.voices import VoiceError, write_codes

    try:
        loaded = load_checkpoint(checkpoint, parts=frozenset({"mimi"}))
        if loaded.folder == SHIPPED_DEMO:
            fail(
                f"the demo model that ships is part of the installation and gets no voices: copy its folder "
                f"(cp -r {SHIPPED_DEMO} my-demo) and give the copy: --checkpoint my-demo"
            )
        if loaded.voices.has(name) and not replace:
            fail(f"{loaded.name} already has a voice {name}; --replace overwrites it")
        assert loaded.mimi is not None  # asked for
        voice = voice_from_wav(recording, None, loaded.mimi, name=name)
    except (CheckpointError, VoiceError) as error:
        fail(str(error))
    assert voice.codes is not None  # a recording always gives codes
    target = loaded.folder / "voices" / f"{name}.safetensors"
    try:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(write_codes(voice.codes))
    except OSError as error:
        fail(f"{target} cannot be written: {error.strerror}")
    note(f"{name}: {voice.seconds:.1f} s, {voice.frames} frames, in {target}")

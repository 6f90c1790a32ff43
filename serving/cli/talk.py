"""`personaplex talk`: a recording goes in, the agent's answer comes out."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.cli.console import WRONG_USE, err, fail, introduce, note
from serving.cli.options import CHECKPOINT_HELP

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

FRAME_S = 0.08
MOST_SEED = 2**63 - 1

Temperature = Annotated[
    float | None,
    typer.Option(min=0, max=10, metavar="T", help="0: always the likeliest.", show_default="the checkpoint's"),
]
TopK = Annotated[
    int | None,
    typer.Option(min=1, metavar="K", help="Draw among the K likeliest.", show_default="the checkpoint's"),
]


@dataclass(frozen=True)
class Wish:
    """What was asked for, checked. sampling: fields of graphs.stages.Sampling, those that were given."""

    voice: str
    role: str
    seed: int
    sampling: dict[str, float]


def talk(
    recording: Annotated[Path, typer.Argument(metavar="IN.wav", help="What the user says; any rate, any format.")],
    answer: Annotated[Path, typer.Argument(metavar="OUT.wav", help="Where the agent's voice goes: 24 kHz mono.")],
    voice: Annotated[
        str, typer.Option(help="A name from `personaplex voices`.", show_default="the checkpoint's first choice")
    ] = "",
    role: Annotated[
        str, typer.Option(metavar="TEXT|@FILE", help="Who the agent is to be; @FILE: what stands there.")
    ] = "",
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Same seed, same answer.", show_default="drawn, and printed"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="OUT.json", help="Also write the agent's words, with their times.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="A running server, e.g. http://localhost:8998.")
    ] = None,
    key: Annotated[str | None, typer.Option(envvar="PERSONAPLEX_KEY", help="API key for --server.")] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "-c", help=f"Without --server. {CHECKPOINT_HELP}")
    ] = "demo",
    device: Annotated[str, typer.Option(help="Without --server: auto, cpu or cuda.")] = "auto",
    text_temperature: Temperature = None,
    text_topk: TopK = None,
    audio_temperature: Temperature = None,
    audio_topk: TopK = None,
) -> None:
    """Stream a recording to the agent and keep what it says meanwhile.

    The answer is as long as the recording: a full-duplex agent listens
    and speaks at the same time. Without --server the actors of a replica
    are started on this machine for this one conversation, which runs as
    fast as it can; with --server it is held over /api/chat in real time.

    \b
      personaplex talk question.wav answer.wav
      personaplex talk question.wav answer.wav --voice NATM1 --seed 7
      personaplex talk question.wav answer.wav --role @teacher.txt --text words.json
      personaplex talk question.wav answer.wav --server http://localhost:8998
    """
    from loadtest.speech import UnreadableAudio, read_speech, write_wav

    if seed is not None and seed > MOST_SEED:
        fail(f"--seed: {seed} is too large, it may be {MOST_SEED} at most", WRONG_USE)
    asked = {
        "text_temperature": text_temperature,
        "text_top_k": text_topk,
        "audio_temperature": audio_temperature,
        "audio_top_k": audio_topk,
    }
    wish = Wish(
        voice=voice,
        role=read_role(role),
        seed=secrets.randbelow(2**31) if seed is None else seed,
        sampling={name: value for name, value in asked.items() if value is not None},
    )
    try:
        speech = read_speech(recording)
    except UnreadableAudio as error:
        fail(str(error), WRONG_USE)
    pcm, words = (
        _through_actors(checkpoint, device, speech, wish) if server is None else _over_server(server, key, speech, wish)
    )
    try:
        write_wav(answer, pcm)
        if text is not None:
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(_readable(words), encoding="utf-8")
    except OSError as error:
        fail(f"the answer cannot be written: {error}")
    said = "".join(piece["text"] for piece in words["pieces"]).strip()
    note(f"{answer}: {len(pcm) / 24_000:.2f} s, voice {words['voice']}, seed {words['seed']}")
    if said:
        err.print(f"it said: {said}", markup=False, highlight=False, soft_wrap=True)


def read_role(role: str) -> str:
    """TEXT, or the content of FILE for @FILE."""
    if not role.startswith("@"):
        return role
    try:
        return Path(role[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"the role cannot be read from {role[1:]}: {error}", WRONG_USE)


def _over_server(
    server: str, key: str | None, speech: npt.NDArray[np.float32], wish: Wish
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    from loadtest.chat_client import ChatFailed, hold_conversation
    from loadtest.chat_wire import ChatOptions, WireError
    from loadtest.speech import Recording

    spoken = Recording.of("talk", speech)
    sampling = {name.replace("top_k", "topk"): f"{value:g}" for name, value in wish.sampling.items()}
    options = ChatOptions(wish.voice, wish.role, wish.seed, key, sampling)
    try:
        with _progress(f"talking to {server}", spoken.frames) as advance:
            held = asyncio.run(hold_conversation(server, spoken, options, on_frame=advance))
    except (ChatFailed, WireError) as error:
        fail(str(error))
    except ValueError as error:
        fail(str(error), WRONG_USE)
    pieces = [{"start_s": round(piece.start_s, 3), "text": piece.text} for piece in held.text]
    introduce(held.metadata.get("trained"), str(held.metadata.get("notice", "")))
    chosen = replace(wish, voice=str(held.metadata.get("voice", wish.voice)))
    return held.agent, _words(chosen, server, pieces)


def _through_actors(
    checkpoint: str, device: str, speech: npt.NDArray[np.float32], wish: Wish
) -> tuple[npt.NDArray[np.int16], dict[str, Any]]:
    from actors.errors import ServingError
    from graphs.stages import SessionSpec
    from loadtest.speech import in_frames, to_int16
    from models.checkpoint import CheckpointError
    from models.voices import VoiceError
    from serving.offline_app import answer_recording

    frames = to_int16(in_frames(speech))
    spec = SessionSpec(wish.voice, wish.role, wish.seed)
    try:
        with _progress("starting the actors", len(frames)) as advance:
            answer = answer_recording(checkpoint, frames, spec, sampling=wish.sampling, device=device, on_frame=advance)
    except (ServingError, CheckpointError, VoiceError, ValueError) as error:
        fail(str(error))
    introduce(answer.trained, answer.notice)
    heard = answer.heard
    pieces = [
        {"start_s": round(frame * FRAME_S, 3), "text": piece} for frame, piece in enumerate(heard.pieces) if piece
    ]
    words = _words(replace(wish, voice=answer.voice), answer.checkpoint, pieces)
    words["tokens"] = heard.tokens.tolist()  # [frames, 9]: the text token and the agent's eight codes
    return heard.pcm[: len(speech)], words


def _words(wish: Wish, source: str, pieces: list[dict[str, Any]]) -> dict[str, Any]:
    return {"source": source, "voice": wish.voice, "role": wish.role, "seed": wish.seed, "pieces": pieces}


def _readable(words: dict[str, Any]) -> str:
    """JSON with a line for each piece and each frame: indenting every number would make thousands."""

    def shown(value: object) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {shown(value)}" for name, value in words.items()) + "\n}\n"


@contextmanager
def _progress(label: str, frames: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, advanced by the number of frames heard so far."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[heard_s]:.1f} of {task.fields[whole_s]:.1f} s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(label, total=frames, heard_s=0.0, whole_s=frames * FRAME_S)
        yield lambda heard: progress.update(bar, completed=heard, heard_s=heard * FRAME_S, description="talking")

"""Dialogues put together from encoded utterances: `python -m training.splice --dialogues 12000`.

A script says who speaks when; the utterances' codes are laid on silence, or on what a user's line carries. So a plan's
few thousand utterances become as many dialogues as one likes, at no cost, where rendering and encoding them takes
hours. What is lost is what one utterance does to the codes of the next: the rendered dialogues beside them have that.
Written as shards like those of `training.codes`, which the language model reads together with them.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file

from models.config import AUDIO_CODEBOOKS, FRAME_SAMPLES, NO_INPUT, STREAMS
from models.demo_checkpoint import TOKENIZER
from models.mimi import Mimi
from models.prompt import AGENT, USER
from models.tokenizer import TextTokenizer
from training.bank import Bank
from training.codec_model import codes_digest
from training.codes import Coded, load_codec, save_whole, shard_of
from training.false_starts import false_starts
from training.folders import state_folder
from training.kokoro import RATE, Utterance, Word
from training.lateness import missed, waits
from training.listening import LATE_S
from training.listening import ROLE as LISTENER
from training.pieces import VARIANTS, Codes, Piece, Pieces, Said, between, encode_missing, played
from training.plans import PLANS, held_out_of, script_of
from training.readings import ROLE as READER
from training.recitals import ROLE as RECITER
from training.recitals import recited
from training.roles import Split
from training.script import Script
from training.text_stream import frame_of, text_stream
from training.timeline import Placed, Timeline, lay_out

_PER_SHARD = 500


@dataclass(frozen=True)
class Codec:
    """What belongs to the codec whose codes these are."""

    pieces: Pieces
    silence: Codes  # [8]
    between: list[Codes]  # `training.pieces.between`
    tokenizer: TextTokenizer


def user_of(script: Script, seed: int) -> int:
    """Which variant of its voice a dialogue's user has."""
    return int(np.random.default_rng([seed, script.index, 5]).integers(len(VARIANTS["user"])))


def splice(script: Script, timeline: Timeline, codec: Codec, seed: int) -> tuple[Codes, npt.NDArray[np.bool_]]:
    """[frames, 17] int16, undelayed: text, agent's and user's codes; and [frames]: where the agent is learnt from.

    timeline: with the user's utterances as that variant of them is played. A word cut off by an interruption ends at
    a frame. Where somebody speaks beside the user, the user is heard.
    """
    rng = np.random.default_rng([seed, script.index, 4])
    user = user_of(script, seed)
    frames = -(-timeline.samples // FRAME_SAMPLES)
    table = np.zeros((frames, STREAMS), dtype=np.int16)
    table[:, AGENT] = NO_INPUT if script.role == LISTENER else codec.silence
    noise = codec.between[user]
    table[:, USER] = noise[(np.arange(frames) + int(rng.integers(len(noise)))) % len(noise)]
    spoken: list[Word] = []
    laid: dict[Placed, tuple[int, int]] = {}
    for item in sorted(timeline.placed, key=lambda item: (item.speaker != "aside", item.start)):
        variant = user if item.speaker == "user" else int(rng.integers(len(VARIANTS[item.speaker])))
        piece = codec.pieces.get(Said(item.speaker, item.voice, item.text), variant)
        first, heard = round((item.start - piece.offset) / FRAME_SAMPLES), _heard(item, piece.offset)
        words = _lay(table, item, piece, first, heard)
        if script.role == LISTENER:
            spoken += [replace(word, start_s=word.end_s + LATE_S) for word in words]
        elif item.speaker == "agent":
            spoken += _called(table, words, item, script.told)
            laid[item] = (first, first + (len(piece.codes) if heard is None else heard))
    learnt = np.ones(frames, dtype=np.bool_)
    if script.split == "train":
        for span in waits(timeline, laid):
            learnt[slice(*span)] = False
        for start in false_starts(timeline, np.random.default_rng([seed, script.index, 8])):
            answer = start.answer
            piece = codec.pieces.get(Said(answer.speaker, answer.voice, answer.text), 0)
            words = _lay(table, answer, piece, start.frame, start.frames)
            until_s = (start.frame + start.frames) * FRAME_SAMPLES / RATE
            words = [word for word in words if word.start_s < until_s]
            spoken += _called(table, words, answer, script.told)
            learnt[slice(*start.unlearnt)] = False
    spoken.sort(key=lambda word: word.start_s)
    table[:, 0] = text_stream([word for word in spoken if word.start_s >= 0], frames, codec.tokenizer.encode)
    return table, learnt


def _lay(table: Codes, item: Placed, piece: Piece, first: int, heard: int | None) -> list[Word]:
    """Lays an utterance, or its first `heard` frames, from frame `first` on. Returns its words as they sound there.

    But for an agent's first one, which is written where its breath begins: that somebody begins is for the text to say,
    not for the codes of a breath, which hardly differ from silence. Without the breath, words lose their first sound.
    """
    first = max(0, first)
    codes = piece.codes[:heard][: len(table) - first]
    table[first : first + len(codes), AGENT if item.speaker == "agent" else USER] = codes
    shift = (first * FRAME_SAMPLES + piece.offset - item.start) / RATE
    words = [replace(word, start_s=word.start_s + shift, end_s=word.end_s + shift) for word in item.words]
    if item.speaker == "agent" and words:
        words[0] = replace(words[0], start_s=min(words[0].start_s, first * FRAME_SAMPLES / RATE))
    return words


def _called(table: Codes, words: list[Word], item: Placed, told: Mapping[str, str]) -> list[Word]:
    """What an agent says, as its text has it. Where its voice says something else, the voice is taken out."""
    said = item.text.split()
    found = []
    for word, old, new in zip(words, said, told.get(item.text, item.text).split(), strict=False):  # cut: fewer words
        if old != new:
            table[max(0, frame_of(word.start_s)) : frame_of(word.end_s) + 1, AGENT] = NO_INPUT
        found.append(replace(word, text=word.text if old == new else new))
    return found


def _heard(item: Placed, offset: int) -> int | None:
    """Frames of an utterance that are heard; None: all of them, and what a room adds."""
    if not item.cut:
        return None
    return -(-(offset + item.samples) // FRAME_SAMPLES)


def said_in(script: Script) -> Iterator[Said]:
    """Everything that somebody says in a script."""
    if script.role == RECITER:
        return
    voices = {"agent": script.agent_voice, "user": script.user_voice, "aside": script.aside_voice}
    for turn in script.turns:
        for part in turn.parts:
            yield Said(turn.speaker, voices[turn.speaker], part)


def wanted(scripts: Iterable[Script], bank: Bank) -> list[Said]:
    """What scripts say, as far as the bank speaks it, each once, in order of need."""
    found: dict[Said, bool] = {}
    for script in scripts:
        for said in said_in(script):
            if said not in found:
                found[said] = bank.has(said.voice, said.text)
    return [said for said, spoken in found.items() if spoken]


def _own_codec(folder: Path, codec: Path) -> Mimi:
    """The codec whose codes a folder holds. Raises ValueError if they are another one's."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    mimi, _ = load_codec(codec)
    if about["codebooks"] != codes_digest(mimi.state_dict()):
        raise ValueError(f"{folder} holds another codec's codes: run `python -m training.codes` first")
    return mimi


def load_pieces(folder: Path, codec: Path) -> Codec:
    """What is encoded in a folder, and what belongs to its codec.

    Raises ValueError if the codes there are another codec's.
    """
    mimi = _own_codec(folder, codec)
    silence = load_file(folder / "voices.safetensors")["silence"].numpy().astype(np.int16)
    assert silence.shape == (AUDIO_CODEBOOKS,)
    return Codec(Pieces(folder), silence, between(mimi), TextTokenizer(TOKENIZER))


def timeline_of(script: Script, load: Callable[[str, str], Utterance], seed: int) -> Timeline:
    """A script's timeline with its user at the speed of their variant. Raises whatever `load` does."""
    speed = VARIANTS["user"][user_of(script, seed)].speed

    def lookup(voice: str, text: str) -> Utterance:
        return played(load(voice, text), speed) if voice == script.user_voice else load(voice, text)

    return lay_out(script, lookup)


def write_shard(path: Path, scripts: list[Script], codec: Codec, bank: Bank, seed: int) -> int:
    """Some dialogues as `training.codes` writes them. Returns their frames."""
    load = functools.cache(bank.load)
    coded = []
    for script in scripts:
        if script.role == RECITER:
            rng = np.random.default_rng([seed, script.index, 12])
            frames, learnt = recited(script, codec.tokenizer.encode, rng)
            coded.append(Coded(script.index, frames, script.prompt, script.agent_voice, learnt=learnt))
            continue
        if script.split == "train" and script.role != LISTENER:
            script = missed(script, np.random.default_rng([seed, script.index, 9]))
        frames, learnt = splice(script, timeline_of(script, load, seed), codec, seed)
        coded.append(Coded(script.index, frames, script.prompt, script.agent_voice, script.role == READER, learnt))
    shard = shard_of(coded, codec.tokenizer)
    save_whole(path, shard)
    return len(shard["frames"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=sorted(PLANS), default="first")
    parser.add_argument(
        "--dialogues", type=int, default=12_000, help="numbers tried; those the bank can speak are made"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that encode utterances")
    parser.add_argument("--codec", type=Path, default=state_folder() / "codec")
    parser.add_argument("--folder", type=Path, default=state_folder() / "codes", help="where training.codes wrote")
    arguments = parser.parse_args()
    folder, plan, bank = arguments.folder, PLANS[arguments.plan], Bank()
    sides: list[tuple[Split, int]] = [("held_out", held_out_of(plan)), ("train", arguments.dialogues)]
    speakable = functools.cache(bank.has) if plan.spoken else None
    scripts = {split: [script_of(plan, split, index, speakable) for index in range(count)] for split, count in sides}
    needed = wanted([script for side in scripts.values() for script in side], bank)
    try:
        _own_codec(folder, arguments.codec)  # to another codec's, none are added
    except ValueError as problem:
        parser.error(str(problem))
    encode_missing(arguments.codec, folder, needed, arguments.workers)
    codec = load_pieces(folder, arguments.codec)
    for split, side in scripts.items():
        _write(folder, f"{split}-spliced-{arguments.plan}", side, codec, bank, plan.seed)


def _write(folder: Path, name: str, scripts: list[Script], codec: Codec, bank: Bank, seed: int) -> None:
    """The shards of one side, in place of those that were there."""
    ready = [script for script in scripts if all(codec.pieces.complete(said) for said in said_in(script))]
    shards = [ready[first : first + _PER_SHARD] for first in range(0, len(ready), _PER_SHARD)]
    frames, written = 0, set()
    for number, shard in enumerate(shards):
        target = folder / f"{name}-{number:03d}.safetensors"
        written.add(target)
        frames += write_shard(target, shard, codec, bank, seed)
        hours = frames * FRAME_SAMPLES / RATE / 3600
        print(f"\r{name}: {number + 1}/{len(shards)} shards, {hours:.1f} h ", end="", flush=True)
    for left in set(folder.glob(f"{name}-???.safetensors")) - written:
        left.unlink()
    print(f"\n{len(scripts) - len(ready)} of {len(scripts)} wait for the bank", flush=True)


if __name__ == "__main__":
    main()

"""Utterances as codes: each is encoded by itself, so that dialogues can be put together without rendering them.

An agent's words begin with frames, a user's utterance anywhere within one; before both the codec heard silence. A
user's is kept in several variants, each elsewhere in its frame and on another line: higher and faster, or lower and
slower, as voices that the synthesiser does not have. What a line carries between utterances is encoded, too: noise that
ended with the words would tell the model that somebody has finished, which no real line does. Encoding the few hours
that a plan's utterances last takes minutes; encoding the dialogues they occur in takes days.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from models.config import FRAME_SAMPLES
from models.mimi import Mimi
from training.augment import Audio, coloured_noise, convolve, decibels, limited, room_response
from training.bank import Bank, key_of
from training.codes import SETTLED, encode, load_codec, save_whole
from training.kokoro import RATE, Utterance
from training.script import Speaker


@dataclass(frozen=True)
class Line:
    """How a variant is heard."""

    speed: float = 1.0  # above 1: faster and higher
    gain_db: float = 0.0
    noise_db: float | None = None  # of full scale, before the gain; None: none
    slope: float = 1.0  # see augment.coloured_noise


# A dialogue's user is on one line throughout.
VARIANTS: dict[Speaker, tuple[Line, ...]] = {
    "agent": (Line(),),
    "user": (
        Line(),
        Line(gain_db=-6.0, noise_db=-50.0),
        Line(speed=0.9, gain_db=-9.0),
        Line(speed=1.12, gain_db=-3.0, noise_db=-42.0, slope=2.0),
        Line(speed=0.84, gain_db=-2.0),
        Line(speed=1.06, gain_db=-12.0, noise_db=-55.0),
        Line(speed=0.95, gain_db=-4.0, noise_db=-38.0, slope=1.5),
        Line(speed=1.19, gain_db=-6.0),
    ),
    "aside": (Line(),),
}
ROOM_SHARE = 0.4  # of users' utterances
LEAD = 6  # frames of silence before the first one that is kept: in a call the codec has a context, too
TAIL = 10  # frames kept after the last sample: so long the codes of silence still remember what was said
BETWEEN_S = 20.0  # of every line's noise
_PER_SHARD = 400
_AT_ONCE = 8

Codes = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Said:
    """Somebody saying something. An agent is heard as it is, a user over a line, a bystander from across the room."""

    speaker: Speaker
    voice: str
    text: str


@dataclass(frozen=True)
class Piece:
    """codes [frames, 8] int16; the utterance begins `offset` samples behind the first frame's begin."""

    codes: Codes
    offset: int


def played(utterance: Utterance, speed: float) -> Utterance:
    """Faster and higher, or slower and lower: between samples by straight lines, as speech has little above 8 kHz."""
    if speed == 1.0:
        return utterance
    at = np.arange(0.0, len(utterance.pcm) - 1, speed)
    pcm = np.interp(at, np.arange(len(utterance.pcm)), utterance.pcm).astype(np.int16)
    words = tuple(replace(w, start_s=w.start_s / speed, end_s=w.end_s / speed) for w in utterance.words)
    return Utterance(pcm, words)


def recorded(said: Said, variant: int, utterance: Utterance) -> tuple[Audio, int]:
    """What the codec hears: lead, utterance, tail, whole frames of fp32; and the utterance's offset in its frame."""
    rng = np.random.default_rng([int(key_of(said.voice, said.text)[:8], 16), variant, len(said.speaker)])
    line = VARIANTS[said.speaker][variant]
    utterance = played(utterance, line.speed)
    offset = int(rng.integers(FRAME_SAMPLES))
    if said.speaker == "agent" and utterance.words:
        offset = -round(utterance.words[0].start_s * RATE) % FRAME_SAMPLES  # its first word begins a frame
    frames = LEAD + -(-(offset + len(utterance.pcm)) // FRAME_SAMPLES) + TAIL
    sound = np.zeros(frames * FRAME_SAMPLES, dtype=np.float32)
    start = LEAD * FRAME_SAMPLES + offset
    sound[start : start + len(utterance.pcm)] = utterance.pcm.astype(np.float32) / np.float32(32768.0)
    if said.speaker == "agent":
        return limited(sound), offset
    if said.speaker == "aside":
        sound = convolve(sound, room_response(rng)) * np.float32(decibels(-float(rng.uniform(12, 20))))
    elif rng.random() < ROOM_SHARE:
        sound = convolve(sound, room_response(rng))
    return carried(sound, line, rng), offset


def carried(sound: Audio, line: Line, rng: np.random.Generator) -> Audio:
    """What comes out of a line."""
    if line.noise_db is not None:
        sound = sound + coloured_noise(len(sound), line.slope, rng) * np.float32(decibels(line.noise_db))
    return limited(sound * np.float32(decibels(line.gain_db)))


def between(mimi: Mimi) -> list[Codes]:
    """What a user's lines carry while nobody speaks: codes [frames, 8] for each."""
    frames = round(BETWEEN_S * RATE / FRAME_SAMPLES)
    found = []
    for number, line in enumerate(VARIANTS["user"]):
        silence = np.zeros((frames + SETTLED) * FRAME_SAMPLES, dtype=np.float32)
        sound = carried(silence, line, np.random.default_rng([number, 6]))
        [codes] = encode(mimi, np.round(sound * 32767.0).astype(np.int16)[:, None])
        found.append(codes[SETTLED:])
    return found


def encode_pieces(mimi: Mimi, wanted: Sequence[tuple[Said, int]], bank: Bank) -> list[Piece]:
    """In the order asked for. Raises FileNotFoundError for an utterance that was never spoken."""
    sounds = [recorded(said, variant, bank.load(said.voice, said.text)) for said, variant in wanted]
    order = sorted(range(len(sounds)), key=lambda number: len(sounds[number][0]))
    pieces: dict[int, Piece] = {}
    for first in range(0, len(order), _AT_ONCE):
        group = order[first : first + _AT_ONCE]  # of about one length
        table = np.zeros((max(len(sounds[number][0]) for number in group), len(group)), dtype=np.int16)
        for column, number in enumerate(group):
            sound = sounds[number][0]
            table[: len(sound), column] = np.clip(np.round(sound * 32767.0), -32768, 32767)
        for codes, number in zip(encode(mimi, table), group, strict=True):
            sound, offset = sounds[number]
            pieces[number] = Piece(codes[LEAD : len(sound) // FRAME_SAMPLES].copy(), offset)
    return [pieces[number] for number in range(len(sounds))]


def _work(codec: Path, folder: Path, job: tuple[int, list[tuple[Said, int]]]) -> str:
    os.nice(max(0, 19 - os.nice(0)))
    torch.set_num_threads(1)
    number, wanted = job
    pieces = encode_pieces(load_codec(codec)[0], wanted, Bank())
    target = folder / f"spoken-{number:04d}.safetensors"
    names = json.dumps([[said.speaker, said.voice, said.text, variant] for said, variant in wanted])
    tensors = {
        "codes": torch.from_numpy(np.concatenate([piece.codes for piece in pieces])),
        "ends": torch.tensor(np.cumsum([len(piece.codes) for piece in pieces])),
        "offsets": torch.tensor([piece.offset for piece in pieces]),
    }
    save_whole(target, tensors, {"names": names})
    return f"{target.name}: {len(pieces)} utterances, {len(tensors['codes'])} frames"


class Pieces:
    """Every utterance encoded so far, of `.state/codes/spoken-*`."""

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[tuple[Said, int], Piece] = {}
        self.shards = 0
        for path in sorted(folder.glob("spoken-????.safetensors")):
            self.shards = int(path.stem[-4:]) + 1
            with safe_open(path, "np") as file:
                names = json.loads(file.metadata()["names"])
                codes, ends, offsets = (file.get_tensor(name) for name in ("codes", "ends", "offsets"))
            starts = [0, *ends[:-1].tolist()]
            for (speaker, voice, text, variant), a, b, offset in zip(names, starts, ends, offsets, strict=True):
                self._pieces[Said(speaker, voice, text), variant] = Piece(codes[a:b], int(offset))

    def __contains__(self, wanted: tuple[Said, int]) -> bool:
        return wanted in self._pieces

    def complete(self, said: Said) -> bool:
        """Whether all its variants are there."""
        return all((said, variant) in self for variant in range(len(VARIANTS[said.speaker])))

    def get(self, said: Said, variant: int) -> Piece:
        """Raises KeyError if it was never encoded."""
        return self._pieces[said, variant]


def encode_missing(codec: Path, folder: Path, wanted: Iterable[Said], workers: int) -> None:
    """Encodes what is not there yet, with a progress line; can be stopped at any moment and goes on."""
    have = Pieces(folder)
    every = [(said, variant) for said in wanted for variant in range(len(VARIANTS[said.speaker]))]
    missing = [each for each in every if each not in have]
    jobs = [
        (have.shards + number, missing[first : first + _PER_SHARD])
        for number, first in enumerate(range(0, len(missing), _PER_SHARD))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for number, told in enumerate(pool.map(partial(_work, codec, folder), jobs)):
            print(f"{number + 1}/{len(jobs)}  {told}", flush=True)

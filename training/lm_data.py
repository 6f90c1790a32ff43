"""Sequences for the language model: encoded dialogues behind their system prompts, delayed and weighted.

The prompt comes from models/prompt.py, which the server uses, too. Runs on torch, numpy and safetensors alone:
text was tokenized when the dialogues were encoded.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import AUDIO_CODEBOOKS, NO_INPUT, STREAMS, TEXT_END_OF_PAD, TEXT_PAD, LMConfig
from models.prompt import AGENT, USER, build_prompt
from models.voices import VoicePrompt
from training.prefetch import numbered

Codes = npt.NDArray[np.int16]
Sequence = tuple[Codes, npt.NDArray[np.float32]]  # columns and what their tokens count: `columns_of`
GENERATED = 1 + AUDIO_CODEBOOKS
SPELL_FRAMES = 38
NEAR = 4  # codebooks learnt at every frame, the semantic one among them


@dataclass(frozen=True)
class Weights:
    """What a prediction's loss counts. Moshi: semantic 100, acoustic 1; PersonaPlex: acoustic 0.02, padding 0.3.

    Those fine-tune a model that already speaks. From scratch the acoustic codes have everything to learn; most of all
    the first three, without which words are not understood (training/README.md).
    """

    text: float = 1.0
    padding: float = 0.3
    semantic: float = 1.0
    near: float = 0.4  # books 2 to 4
    far: float = 0.1  # those behind


class LMPart(NamedTuple):
    """Some of a batch's sequences, as many as are calculated at once."""

    columns: Tensor  # [sequences, time, 17] int64
    inputs: Tensor  # the same as the model is shown them: some of them hidden (-1)
    rows: Tensor  # [n] int64, flat indices of the columns whose successor counts
    weights: Tensor  # [n, 9] fp32, of the successor's text and agent codes
    chosen: Tensor  # [n] bool: where the codes behind the first NEAR are learnt, too

    def to(self, device: torch.device) -> LMPart:
        return LMPart(*(tensor.to(device) for tensor in self))


class LMBatch(NamedTuple):
    parts: list[LMPart]
    totals: Tensor  # [2] fp32: what all text counts together, and how many frames' codes count

    @property
    def frames(self) -> int:
        return sum(part.columns.shape[0] * part.columns.shape[1] for part in self.parts)


@dataclass(frozen=True)
class Item:
    """One dialogue: [frames, 17] undelayed (text, agent, user), the role's tokens and the agent's voice."""

    frames: Codes
    role: Codes
    voice: int
    reading: bool = False  # its words follow from nothing: they are not learnt
    learnt: npt.NDArray[np.bool_] | None = None  # [frames]; None: all of them

    @property
    def lesson(self) -> bool:
        """Whether its agent has no voice: `training.listening`, `training.recitals`."""
        return bool((self.frames[:, AGENT] == NO_INPUT).all())


class EncodedDialogues:
    """The shards of one side, and the voices' prompts. Written by training/codes.py."""

    def __init__(self, folder: Path, side: str) -> None:
        """Raises FileNotFoundError if nothing is encoded."""
        paths = sorted(folder.glob(f"{side}-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {side} dialogues: run `python -m training.codes` first")
        self.items = [item for path in paths for item in _items(load_file(path))]
        self.readings = [item for item in self.items if item.reading]
        self.lessons = [item for item in self.items if item.lesson]
        self.dialogues = [item for item in self.items if not (item.reading or item.lesson)] or self.readings
        stored = load_file(folder / "voices.safetensors")
        self.silence = tuple(stored["silence"].tolist())
        self.sine = tuple(stored["sine"].tolist())
        # prompt-<voice>-<number>: codes [T, 8]
        self.prompts: dict[int, list[Tensor]] = {}
        for name in sorted(stored):
            if name.startswith("prompt-"):
                self.prompts.setdefault(int(name.split("-")[1]), []).append(stored[name].long())

    @property
    def frames(self) -> int:
        return sum(len(item.frames) for item in self.items)


def _items(shard: dict[str, Tensor]) -> list[Item]:
    frames, roles = shard["frames"].numpy(), shard["roles"].numpy()
    ends, role_ends = shard["frame_ends"].tolist(), shard["role_ends"].tolist()
    starts, role_starts = [0, *ends[:-1]], [0, *role_ends[:-1]]
    readings = shard.get("readings", torch.zeros(len(ends), dtype=torch.bool)).tolist()
    learnt = shard["learnt"].numpy() if "learnt" in shard else np.ones(len(frames), dtype=np.bool_)
    spans = zip(starts, ends, role_starts, role_ends, shard["voices"].tolist(), readings, strict=True)
    return [Item(frames[a:b], roles[c:d], int(voice), reading, learnt[a:b]) for a, b, c, d, voice, reading in spans]


def columns_of(
    config: LMConfig, item: Item, voice: Tensor, silence: tuple[int, ...], sine: tuple[int, ...], weights: Weights
) -> Sequence:
    """A dialogue as the model reads it: columns [P + frames, 17] int16, and what each column's tokens count [.., 9].

    The prompt's columns count nothing; in the first live one, the delayed codes still belong to the prompt. A code
    that is not there (NO_INPUT) is neither shown nor learnt.
    """
    prompt = build_prompt(
        config, VoicePrompt("training", codes=voice), item.role.tolist(), silence_codes=silence, sine_codes=sine
    )
    delayed = np.array(config.delays) > 0
    before = np.concatenate([prompt.given[None], item.frames[:-1]])
    live = np.where(delayed, before, item.frames)
    counted = np.zeros((prompt.frames + len(live), GENERATED), dtype=np.float32)
    table = counted[prompt.frames :]
    table[:, 0] = np.where(live[:, 0] == TEXT_PAD, weights.padding, weights.text)
    if item.reading:
        table[(live[:, 0] != TEXT_PAD) & (live[:, 0] != TEXT_END_OF_PAD), 0] = 0.0
    table[:, 1] = weights.semantic
    table[:, 2 : 1 + NEAR] = weights.near
    table[:, 1 + NEAR :] = weights.far
    table[live[:, :GENERATED] == NO_INPUT] = 0.0
    table[0, delayed[:GENERATED]] = 0.0
    if item.learnt is not None:
        before_learnt = np.concatenate([item.learnt[:1], item.learnt[:-1]])
        table *= np.where(delayed[:GENERATED], before_learnt[:, None], item.learnt[:, None])
    return np.concatenate([prompt.columns, live]).astype(np.int16), counted


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn."""

    batch: int  # sequences a step
    part: int  # sequences calculated at once; one needs no padding
    longest: int  # columns of a sequence
    hide: float = 0.0  # of all codes
    deaf: float = 0.0  # of the time, to itself
    far: float = 1.0  # of the frames, whose codes behind the first NEAR are learnt, too
    readings: float = 0.0  # of the sequences, where there are any
    lessons: float = 0.0  # of the sequences, where there are any
    late: float = 0.0  # of the sequences begin behind no prompt, as it is when a conversation has outlived the window
    weights: Weights = field(default_factory=Weights)


def deaf_spells(columns: int, share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """[columns] bool: spells of 3 s on average, `share` of the time together."""
    ends = np.cumsum(rng.geometric(1 / SPELL_FRAMES, size=2 * columns // SPELL_FRAMES + 16))
    deaf = rng.random(len(ends) + 1) < share
    spells: npt.NDArray[np.bool_] = deaf[np.searchsorted(ends, np.arange(columns), side="right").clip(max=len(ends))]
    return spells


def collate(sequences: list[Sequence], config: LMConfig, how: Drawing, rng: np.random.Generator) -> LMPart:
    """Cuts sequences at `how.longest` columns, pads them to the longest left, and lists what counts.

    The model is not shown `how.hide` of the live codes, and for `how.deaf` of the time nothing of its own voice. It
    then neither relies on a single code of what it hears, nor on having said everything as well as the training data
    does; and what it says next follows from the text that it is to say, not from the sound so far.
    """
    time = min(how.longest, max(len(columns) for columns, _ in sequences))
    table = np.full((len(sequences), time, STREAMS), NO_INPUT, dtype=np.int64)
    table[:, :, 0] = TEXT_PAD
    counted = np.zeros((len(sequences), time, GENERATED), dtype=np.float32)
    for number, (columns, weights) in enumerate(sequences):
        length = min(time, len(columns))
        table[number, :length] = columns[:length]
        counted[number, :length] = weights[:length]
    # A column's loss is computed where it is predicted: one position before.
    ahead = np.concatenate([counted[:, 1:], np.zeros_like(counted[:, :1])], axis=1)
    rows = np.flatnonzero(ahead.any(axis=2))
    assert not ((table[:, :, AGENT] > config.card) | (table[:, :, USER] > config.card)).any()
    hidden = rng.random(table.shape, dtype=np.float32) < how.hide
    hidden[:, :, 0] = False
    for number in range(len(sequences)):
        hidden[number, :, AGENT] |= deaf_spells(time, how.deaf, rng)[:, None]
    inputs = np.where(hidden & counted.any(axis=2, keepdims=True), NO_INPUT, table)
    chosen = rng.random(len(rows)) < how.far
    tensors = (table, inputs, rows, ahead.reshape(-1, GENERATED)[rows], chosen)
    return LMPart(*(torch.from_numpy(values) for values in tensors))


def begun_late(columns: Codes, counted: npt.NDArray[np.float32], rng: np.random.Generator) -> Sequence:
    """A sequence from somewhere in its first live half on; what it is about has to be heard before anything counts."""
    live = int(counted.any(axis=1).argmax())
    start = int(rng.integers(live, live + max(1, (len(columns) - live) // 2)))
    counts = counted[start:].copy()
    counts[:SPELL_FRAMES] = 0.0
    return columns[start:], counts


def draw(data: EncodedDialogues, config: LMConfig, how: Drawing, rng: np.random.Generator) -> LMBatch:
    """A training batch: random dialogues, each behind one of its voice's prompts."""
    sequences = []
    for _ in range(how.batch):
        item = _any_of(data, how, rng)
        prompts = data.prompts[item.voice]
        voice = prompts[int(rng.integers(len(prompts)))]
        sequence = columns_of(config, item, voice, data.silence, data.sine, how.weights)
        sequences.append(begun_late(*sequence, rng) if rng.random() < how.late else sequence)
    spans = [sequences[first : first + how.part] for first in range(0, how.batch, how.part)]
    parts = [collate(span, config, how, rng) for span in spans]
    counted = torch.cat([part.weights for part in parts])
    totals = torch.stack([counted[:, 0].sum(), (counted[:, 1] > 0).sum()]).clamp(min=1.0)
    return LMBatch(parts, totals)


def _any_of(data: EncodedDialogues, how: Drawing, rng: np.random.Generator) -> Item:
    kind = rng.random()
    if data.readings and kind < how.readings:
        own = data.readings
    elif data.lessons and kind > 1.0 - how.lessons:
        own = data.lessons
    else:
        own = data.dialogues
    return own[int(rng.integers(len(own)))]


def batches(
    data: EncodedDialogues, config: LMConfig, how: Drawing, seed: int, first: int
) -> Generator[LMBatch, None, None]:
    """Batches number first, first + 1, …; batch n is a function of (data, how, seed, n). To be closed."""
    return numbered(lambda number: draw(data, config, how, np.random.default_rng([seed, number])), first)

"""Sequences for the language model: encoded dialogues behind their system prompts, delayed and weighted.

The prompt comes from models/prompt.py, which the server uses, too. Runs on torch, numpy and safetensors alone:
text was tokenized when the dialogues were encoded.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import AUDIO_CODEBOOKS, STREAMS, TEXT_PAD, LMConfig
from models.prompt import AGENT, USER, build_prompt
from models.voices import VoicePrompt
from training.prefetch import numbered

Codes = npt.NDArray[np.int16]
GENERATED = 1 + AUDIO_CODEBOOKS


@dataclass(frozen=True)
class Weights:
    """What a prediction's loss counts. Moshi: semantic 100, acoustic 1; PersonaPlex: acoustic 0.02, padding 0.3.

    Those fine-tune a model that already speaks. From scratch the acoustic codes have everything to learn.
    """

    text: float = 1.0
    padding: float = 0.3
    semantic: float = 1.0
    acoustic: float = 0.15


class LMBatch(NamedTuple):
    columns: Tensor  # [batch, time, 17] int64
    rows: Tensor  # [n] int64, flat indices of the columns whose successor counts
    weights: Tensor  # [n, 9] fp32, of the successor's text and agent codes


@dataclass(frozen=True)
class Item:
    """One dialogue: [frames, 17] undelayed (text, agent, user), the role's tokens and the agent's voice."""

    frames: Codes
    role: Codes
    voice: int


class EncodedDialogues:
    """The shards of one side, and the voices' prompts. Written by training/codes.py."""

    def __init__(self, folder: Path, side: str) -> None:
        """Raises FileNotFoundError if nothing is encoded."""
        paths = sorted(folder.glob(f"{side}-???.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {side} dialogues: run `python -m training.codes` first")
        self.items = [item for path in paths for item in _items(load_file(path))]
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
    spans = zip(starts, ends, role_starts, role_ends, shard["voices"].tolist(), strict=True)
    return [Item(frames[a:b], roles[c:d], int(voice)) for a, b, c, d, voice in spans]


def columns_of(
    config: LMConfig, item: Item, voice: Tensor, silence: tuple[int, ...], sine: tuple[int, ...], weights: Weights
) -> tuple[Codes, npt.NDArray[np.float32]]:
    """A dialogue as the model reads it: columns [P + frames, 17] int16, and what each column's tokens count [.., 9].

    The prompt's columns count nothing; in the first live one, the delayed codes still belong to the prompt.
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
    table[:, 1] = weights.semantic
    table[:, 2:] = weights.acoustic
    table[0, delayed[:GENERATED]] = 0.0
    return np.concatenate([prompt.columns, live]).astype(np.int16), counted


def collate(sequences: list[tuple[Codes, npt.NDArray[np.float32]]], config: LMConfig, longest: int) -> LMBatch:
    """Cuts sequences at `longest` columns, pads them to the longest left, and lists what counts."""
    time = min(longest, max(len(columns) for columns, _ in sequences))
    table = np.full((len(sequences), time, STREAMS), -1, dtype=np.int64)
    table[:, :, 0] = TEXT_PAD
    counted = np.zeros((len(sequences), time, GENERATED), dtype=np.float32)
    for number, (columns, weights) in enumerate(sequences):
        length = min(time, len(columns))
        table[number, :length] = columns[:length]
        counted[number, :length] = weights[:length]
    # A column's loss is computed where it is predicted: one position before.
    ahead = np.concatenate([counted[:, 1:], np.zeros_like(counted[:, :1])], axis=1).reshape(-1, GENERATED)
    rows = np.flatnonzero(ahead.any(axis=1))
    assert not ((table[:, :, AGENT] > config.card) | (table[:, :, USER] > config.card)).any()
    return LMBatch(torch.from_numpy(table), torch.from_numpy(rows), torch.from_numpy(ahead[rows]))


def draw(
    data: EncodedDialogues, config: LMConfig, batch: int, longest: int, weights: Weights, rng: np.random.Generator
) -> LMBatch:
    """A training batch: random dialogues, each behind one of its voice's prompts."""
    sequences = []
    for index in rng.integers(len(data.items), size=batch):
        item = data.items[int(index)]
        prompts = data.prompts[item.voice]
        voice = prompts[int(rng.integers(len(prompts)))]
        sequences.append(columns_of(config, item, voice, data.silence, data.sine, weights))
    return collate(sequences, config, longest)


def batches(
    data: EncodedDialogues, config: LMConfig, batch: int, longest: int, weights: Weights, seed: int, first: int
) -> Generator[LMBatch, None, None]:
    """Batches number first, first + 1, …; batch n is a function of (data, seed, n). To be closed."""
    return numbered(
        lambda number: draw(data, config, batch, longest, weights, np.random.default_rng([seed, number])), first
    )

"""Neighbours for a golden run: conversations that join, talk other things, fall silent, hang up and join again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import AUDIO_CODEBOOKS, PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES, LMConfig
from models.prompt import Prompt, build_prompt
from models.voices import VoicePrompt

Codes = npt.NDArray[np.int16]

_JOINS, _TALKS, _LEAVES = 0.4, 0.8, 0.08  # a tick; so each neighbour comes and goes several times in a run


class Crowd:
    """Drives some slots of an engine with random conversations, repeatably."""

    def __init__(self, engine: SlotEngine, config: LMConfig, slots: Sequence[int], seed: int = 7) -> None:
        self._engine, self._config = engine, config
        self._random = random.Random(seed)
        self._free = list(slots)
        self._prefilling: list[int] = []
        self._live: list[int] = []
        self.joined = self.left = 0

    def tick(self) -> tuple[list[int], Codes]:
        """Lets neighbours come and go, and returns who talks in this step: slots and codes [n, 8]."""
        for slot in list(self._free):
            if self._random.random() < _JOINS:
                self._free.remove(slot)
                self._prefilling.append(slot)
                self._engine.open(slot, self._prompt(), self._sampling(), self._random.getrandbits(40))
                self.joined += 1
        for group in (self._prefilling, self._live):
            for slot in list(group):
                if self._random.random() < _LEAVES:
                    group.remove(slot)
                    self._free.append(slot)
                    self._engine.close(slot)
                    self.left += 1
        talking = [slot for slot in self._live if self._random.random() < _TALKS]
        self._random.shuffle(talking)
        codes = [self._codes() for _ in talking]
        return talking, np.array(codes, dtype=np.int16).reshape(len(talking), AUDIO_CODEBOOKS)

    def ready(self, slots: Sequence[int]) -> None:
        """Takes note of prompts that are in."""
        for slot in slots:
            if slot in self._prefilling:
                self._prefilling.remove(slot)
                self._live.append(slot)

    def _codes(self) -> list[int]:
        return [self._random.randrange(self._config.card) for _ in range(AUDIO_CODEBOOKS)]

    def _prompt(self) -> Prompt:
        # Short ones: a small golden model may have a window of a few dozen frames, half of it silence already.
        voice = torch.tensor([self._codes() for _ in range(self._random.randrange(1, 5))])
        role = [self._random.randrange(self._config.text_card) for _ in range(self._random.randrange(4))]
        return build_prompt(
            self._config,
            VoicePrompt("neighbour", codes=voice),
            role,
            silence_codes=PUBLISHED_SILENCE_CODES,
            sine_codes=PUBLISHED_SINE_CODES,
        )

    def _sampling(self) -> Sampling:
        return Sampling(self._random.choice([0.0, 0.7]), 25, self._random.choice([0.0, 0.8]), 250)

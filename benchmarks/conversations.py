"""Conversations made of noise: prompts, journals, and engines whose slots are live over as much context as wanted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from graphs.prefix_cache import PrefixOwners
from graphs.slot_engine import SlotEngine
from graphs.stages import Past, Sampling
from models.config import AUDIO_CODEBOOKS, STREAMS, LMConfig
from models.prompt import SILENCE_FRAMES, Prompt, build_prompt

VOICE_FRAMES = 100
NOBODY = np.zeros((0, AUDIO_CODEBOOKS), dtype=np.int16)
NOT_KEPT = PrefixOwners(None, None)


@dataclass(frozen=True)
class NoiseVoice:
    """Random codes [T, 8]."""

    codes: torch.Tensor
    embeddings: torch.Tensor | None = None
    cache: torch.Tensor | None = None
    digest: str = ""


def noise_prompt(config: LMConfig, frames: int, seed: int = 0) -> Prompt:
    """A prompt of so many frames. Raises ValueError if these are fewer than its voice and its silences."""
    dice = np.random.default_rng(seed)
    role = frames - VOICE_FRAMES - 2 * SILENCE_FRAMES
    if role < 0:
        raise ValueError(f"a prompt has {VOICE_FRAMES + 2 * SILENCE_FRAMES} frames at least")
    voice = NoiseVoice(torch.from_numpy(dice.integers(0, config.card, (VOICE_FRAMES, AUDIO_CODEBOOKS))))
    silence = (1,) * AUDIO_CODEBOOKS
    tokens = dice.integers(0, config.text_card, role).tolist()
    return build_prompt(config, voice, tokens, silence_codes=silence, sine_codes=silence)


def noise_past(config: LMConfig, frames: int) -> Past:
    dice = np.random.default_rng(1)
    rows = dice.integers(0, config.card, (frames + 1, STREAMS)).astype(np.int16)
    rows[:, 0] %= config.text_card
    return Past(rows[:-1], 0, rows[-1])


def open_all(
    engine: SlotEngine, slots: Iterable[int], prompt: Prompt, past: Past | None, owners: PrefixOwners = NOT_KEPT
) -> None:
    """Opens `slots` with the same prompt and past, and steps until all are live."""
    for slot in slots:
        engine.open(slot, prompt, Sampling(), slot, past=past, owners=owners)
    while engine.step([], NOBODY).pending:
        pass

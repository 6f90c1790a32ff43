"""Repeats a golden run on our engine or codec, alone or among neighbours; what comes out is compared elsewhere."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.crowd import Crowd
from evaluation.golden import LmGolden, MimiGolden
from graphs.backends import Backends
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import (
    AUDIO_CODEBOOKS,
    FRAME_SAMPLES,
    PUBLISHED_SILENCE_CODES,
    PUBLISHED_SINE_CODES,
    LMConfig,
)
from models.lm import LanguageModel
from models.mimi import Mimi
from models.prompt import Prompt, build_prompt
from models.voices import VoicePrompt

GREEDY = Sampling(text_temperature=0.0, text_top_k=1, audio_temperature=0.0, audio_top_k=1)


class UnboundedEngine(SlotEngine):
    """A golden prompt may be longer than a small model's window; a server would refuse it, the arithmetic does not."""

    @property
    def prompt_limit(self) -> int:
        return sys.maxsize


@dataclass(frozen=True)
class LmOutcome:
    """What our engine made of a golden run, in the golden run's alignment."""

    tokens: Tensor  # [N, 17] int64
    text_logits: Tensor  # [N, text_card]
    audio_logits: Tensor  # [N, 8, card]


def play_lm(
    model: LanguageModel,
    golden: LmGolden,
    slots: int,
    slot: int,
    backend: str | Backends = "auto",
    *,
    neighbours: bool = True,
) -> LmOutcome:
    """Runs a golden conversation in `slot` of an engine of `slots`; with neighbours all others belong to a crowd."""
    engine = UnboundedEngine(model, slots, backend=backend)
    others = [other for other in range(slots) if other != slot] if neighbours else []
    crowd = Crowd(engine, model.config, others)
    pauses = random.Random(1)
    probed: list[tuple[Tensor, Tensor]] = []
    engine.frame_step.probe = lambda text, audio: probed.append((text.cpu(), audio.cpu()))
    text_logits: list[Tensor] = []
    audio_logits: list[Tensor] = []
    prompt = golden_prompt(model.config, golden)
    tokens = [last_prompt_frame(model.config, prompt)]
    engine.open(slot, prompt, GREEDY, seed=0)
    live = False
    while len(text_logits) < len(golden.user):
        talking, codes = crowd.tick()
        # With neighbours the golden conversation sits out some steps: time passes per slot, not per step.
        if live and (not others or pauses.random() < 0.8):
            place = pauses.randrange(len(talking) + 1)
            heard = golden.user[len(text_logits) - 1].numpy().astype(np.int16)
            talking.insert(place, slot)
            codes = np.insert(codes, place, heard, axis=0)
        probed.clear()
        out = engine.step(talking, codes)
        crowd.ready(out.ready)
        drawn = [*talking, *out.ready]
        if slot not in drawn:
            continue
        text, audio = probed[0]
        text_logits.append(text[drawn.index(slot)])
        audio_logits.append(audio[drawn.index(slot)])
        if live:
            heard = codes[talking.index(slot)]
            tokens.append(np.concatenate([out.tokens[talking.index(slot)], heard]))
        live = True
    return LmOutcome(
        torch.from_numpy(np.stack(tokens).astype(np.int64)), torch.stack(text_logits), torch.stack(audio_logits)
    )


def golden_prompt(config: LMConfig, golden: LmGolden) -> Prompt:
    """The golden run's system prompt. Silence and sine are the published codec's, as in the published code."""
    return build_prompt(
        config,
        VoicePrompt("golden", codes=golden.voice),
        golden.role_tokens,
        silence_codes=PUBLISHED_SILENCE_CODES,
        sine_codes=PUBLISHED_SINE_CODES,
    )


def last_prompt_frame(config: LMConfig, prompt: Prompt) -> npt.NDArray[np.int16]:
    """The frame that the prompt ends with, de-delayed: [17]."""
    delayed = np.array(config.delays) > 0
    return np.where(delayed, prompt.given, prompt.columns[-1]).astype(np.int16)


@torch.inference_mode()
def play_mimi(mimi: Mimi, golden: MimiGolden, slots: int, slot: int) -> tuple[Tensor, Tensor]:
    """Streams a golden run in one of `slots` → codes [N, 8] of its PCM, and PCM [N, 1920] of its expected codes.

    The other slots stream noise, pause and start afresh; with neighbours, this one pauses too.
    """
    device = next(mimi.parameters()).device
    encoder, decoder = mimi.init_encoder_state(slots, device=device), mimi.init_decoder_state(slots, device=device)
    noise = torch.Generator().manual_seed(11)
    chance = random.Random(13)
    codes: list[Tensor] = []
    pcm: list[Tensor] = []
    while len(codes) < len(golden.codes):
        frame = len(codes)
        heard = torch.randn(slots, FRAME_SAMPLES, generator=noise)
        said = torch.randint(mimi.config.quantizer.bins, (slots, AUDIO_CODEBOOKS), generator=noise)
        heard[slot], said[slot] = golden.pcm_in[frame], golden.codes[frame]
        active = torch.tensor([slots == 1 or chance.random() < 0.8 for _ in range(slots)])
        for other in range(slots):
            if other != slot and chance.random() < 0.1:
                encoder.reset(other)
                decoder.reset(other)
        new_codes = mimi.encode_frame(heard.to(device), encoder, active.to(device))
        new_pcm = mimi.decode_frame(said.to(device), decoder, active.to(device))
        if active[slot]:
            codes.append(new_codes[slot].cpu())
            pcm.append(new_pcm[slot].cpu())
    return torch.stack(codes), torch.stack(pcm)

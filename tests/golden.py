"""The small golden language model that tests run: its weights, its prompt, its user, and what it must answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file
from torch import Tensor

from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from models.config import PUBLISHED_SILENCE_CODES, PUBLISHED_SINE_CODES, LMConfig
from models.lm import LanguageModel
from models.prompt import Prompt, build_prompt

DATA = Path(__file__).parent / "data"
GREEDY = Sampling(text_temperature=0.0, text_top_k=1, audio_temperature=0.0, audio_top_k=1)
NOBODY: npt.NDArray[np.int16] = np.zeros((0, 8), dtype=np.int16)


@dataclass(frozen=True)
class CodesVoice:
    """A voice given as Mimi codes [T, 8]."""

    codes: Tensor
    embeddings: Tensor | None = None
    cache: Tensor | None = None
    digest: str = "codes"


@dataclass(frozen=True)
class PublishedVoice:
    """A voice in the published form: embeddings [T', dim] and token cache [17, 4]."""

    embeddings: Tensor
    cache: Tensor
    codes: Tensor | None = None
    digest: str = "published"


@cache
def golden_lm() -> LanguageModel:
    """The golden language model in fp32, on the CPU."""
    config = LMConfig.from_dict(json.loads((DATA / "lm_small_config.json").read_text()))
    stored = load_file(DATA / "lm_small.safetensors")
    model = LanguageModel(config)
    # Of the depth transformer's stacked weights the first half is ours; the rest predicts the user.
    own = {name: stored[name][: tensor.shape[0]].float() for name, tensor in model.state_dict().items()}
    model.load_state_dict(own)
    return model


@cache
def golden_run() -> dict[str, Tensor]:
    return load_file(DATA / "lm_small_golden.safetensors")


def golden_user() -> npt.NDArray[np.int16]:
    codes: npt.NDArray[np.int16] = golden_run()["user_codes"].numpy().astype(np.int16)
    return codes


def golden_prompt() -> Prompt:
    run = golden_run()
    return build_prompt(
        golden_lm().config,
        CodesVoice(run["voice_prompt_codes"]),
        run["text_prompt_tokens"].tolist(),
        silence_codes=PUBLISHED_SILENCE_CODES,
        sine_codes=PUBLISHED_SINE_CODES,
    )


def prefill(engine: SlotEngine, slot: int, prompt: Prompt, sampling: Sampling = GREEDY, seed: int = 1) -> None:
    """Opens a slot and steps until it is ready."""
    engine.open(slot, prompt, sampling, seed)
    while slot not in engine.step([], NOBODY).ready:
        pass


def talk(engine: SlotEngine, slot: int, user: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Lets one slot hear `user` [n, 8] alone; returns its frames [n, 9]."""
    return np.stack([engine.step([slot], user[i : i + 1]).tokens[0] for i in range(len(user))])


def random_user(frames: int, seed: int) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(0, 2048, (frames, 8)).astype(np.int16)

"""Golden runs on disk: recordings of the published code on small weights, which parity repeats.

A folder holds any number of them: `<name>_golden.safetensors` with inputs and expectations, `<name>.safetensors`
with the weights and `<name>_config.json` with the constructor's arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.checkpoint_files import CONFIG, FORMAT, VOICES_FOLDER
from models.config import AUDIO_CODEBOOKS, FRAME_SAMPLES, STREAMS
from models.voices import write_codes

SUFFIX = "_golden.safetensors"
VOICE = "golden"  # the name under which a golden run's voice stands in its checkpoint

_LM_KEYS = ("voice_prompt_codes", "text_prompt_tokens", "user_codes", "expected_tokens", "expected_text_logits")
_MIMI_KEYS = ("pcm_in", "expected_codes", "expected_pcm")
_AUDIO_LOGITS = re.compile(r"expected_audio_logits_every_(\d+)")


class GoldenError(ValueError):
    """A folder of golden runs cannot be read; the message says which file and why."""


@dataclass(frozen=True)
class LmGolden:
    """Greedy decoding in fp32, one conversation of N live steps."""

    name: str
    weights: Path
    config: Mapping[str, Any]
    voice: Tensor  # [T, 8] int64
    role_tokens: tuple[int, ...]
    user: Tensor  # [N, 8] int64
    tokens: Tensor  # [N, 17] int64; row t is the frame that was complete after user frame t - 1
    text_logits: Tensor  # [N, text_card]; row t was drawn from after user frame t - 1, row 0 after the prompt
    audio_logits: Tensor  # [M, 8, card], rows 0, every, 2·every, … of the same
    every: int


@dataclass(frozen=True)
class MimiGolden:
    """The codec streamed frame by frame in fp32."""

    name: str
    weights: Path
    config: Mapping[str, Any]
    pcm_in: Tensor  # [N, 1920]
    codes: Tensor  # [N, 8] int64
    pcm_out: Tensor  # [N, 1920]


Golden = LmGolden | MimiGolden


def read_goldens(folder: Path) -> list[Golden]:
    """All golden runs of a folder, in order of their names. Raises GoldenError if there is none, or one is broken."""
    if not folder.is_dir():
        raise GoldenError(f"{folder} is not a folder")
    goldens = [_read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    if not goldens:
        raise GoldenError(f"{folder} holds no *{SUFFIX}: nothing to compare with")
    return goldens


def _read(path: Path) -> Golden:
    name = path.name.removesuffix(SUFFIX)
    weights, config_path = path.with_name(f"{name}.safetensors"), path.with_name(f"{name}_config.json")
    for needed in (weights, config_path):
        if not needed.is_file():
            raise GoldenError(f"{path.name} needs {needed.name} beside it")
    try:
        tensors = load_file(path)
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError) as error:
        raise GoldenError(f"{path.parent / name}: {error}") from error
    if tensors.keys() >= set(_MIMI_KEYS):
        return _mimi(path, weights, config, tensors)
    if tensors.keys() >= set(_LM_KEYS):
        return _lm(path, weights, config, tensors)
    raise GoldenError(f"{path} is neither a language model's run {_LM_KEYS} nor a codec's {_MIMI_KEYS}")


def _mimi(path: Path, weights: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> MimiGolden:
    pcm_in, codes, pcm_out = (tensors[key] for key in _MIMI_KEYS)
    frames = codes.shape[0]
    if codes.shape[1:] != (AUDIO_CODEBOOKS,) or {pcm_in.numel(), pcm_out.numel()} != {frames * FRAME_SAMPLES}:
        raise GoldenError(f"{path}: {frames} frames of codes do not go with {pcm_in.numel()} samples")
    shape = (frames, FRAME_SAMPLES)
    name = path.name.removesuffix(SUFFIX)
    return MimiGolden(name, weights, config, pcm_in.reshape(shape), codes, pcm_out.reshape(shape))


def _lm(path: Path, weights: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> LmGolden:
    voice, role, user, tokens, text_logits = (tensors[key] for key in _LM_KEYS)
    audio = next(((match, tensors[key]) for key in tensors if (match := _AUDIO_LOGITS.fullmatch(key))), None)
    if audio is None:
        raise GoldenError(f"{path} holds no expected_audio_logits_every_N")
    every, audio_logits = int(audio[0][1]), audio[1]
    steps = user.shape[0]
    fits = (
        tokens.shape == (steps, STREAMS)
        and text_logits.shape[0] == steps
        and user.shape[1:] == voice.shape[1:] == (AUDIO_CODEBOOKS,)
        and audio_logits.shape[0] == len(range(0, steps, every))
    )
    if not fits:
        raise GoldenError(f"{path}: its tensors disagree on the number of steps or streams")
    return LmGolden(
        name=path.name.removesuffix(SUFFIX),
        weights=weights,
        config=config,
        voice=voice,
        role_tokens=tuple(role.tolist()),
        user=user,
        tokens=tokens,
        text_logits=text_logits,
        audio_logits=audio_logits,
        every=every,
    )


def write_checkpoint(golden: Golden, folder: Path) -> Path:
    """Arranges a golden run's weights as a checkpoint in an existing empty folder, and returns the folder.

    A run of the language model brings its voice, as the voice "golden"; its role comes as tokens, for there is
    no tokenizer.
    """
    config: dict[str, Any] = {"format": FORMAT, "name": golden.name, "trained": False, "tokenizer": None}
    if isinstance(golden, LmGolden):
        config["lm"] = dict(golden.config)
        (folder / "model.safetensors").symlink_to(golden.weights.resolve())
        (folder / VOICES_FOLDER).mkdir()
        (folder / VOICES_FOLDER / f"{VOICE}.safetensors").write_bytes(write_codes(golden.voice.to(torch.int64)))
    else:
        config["mimi"] = dict(golden.config)
        (folder / "mimi.safetensors").symlink_to(golden.weights.resolve())
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder

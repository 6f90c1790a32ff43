"""A checkpoint as one object: language model, codec, tokenizer and voices, from a folder or a Hugging Face repo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models.checkpoint_files import (
    LM_FILES,
    MIMI_FILES,
    TOKENIZER_FILES,
    CheckpointError,
    CheckpointFiles,
    find_checkpoint,
)
from models.checkpoint_tensors import (
    check_shapes,
    fill_module,
    lm_shapes,
    module_shapes,
    stored_depth_steps,
    stored_shapes,
)
from models.config import (
    AUDIO_CODEBOOKS,
    PUBLISHED_SILENCE_CODES,
    PUBLISHED_SINE_CODES,
    LMConfig,
    MimiConfig,
    Sampling,
)
from models.lm import LanguageModel
from models.mimi import Mimi
from models.tokenizer import TextTokenizer
from models.voices import VoiceLibrary, VoiceShapes

__all__ = ["ALL_PARTS", "Checkpoint", "CheckpointError", "SuggestedRole", "load_checkpoint"]

ALL_PARTS = frozenset({"lm", "mimi", "text"})


@dataclass(frozen=True)
class SuggestedRole:
    """A role that a model is known to play: what a chooser shows, and the prompt behind it."""

    name: str
    text: str


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded. A part that was not asked for is None; configs, codes and voices are always there."""

    name: str
    trained: bool  # False: random weights, it cannot speak yet
    notice: str  # what whoever meets this model is told of it: "" for a published one
    folder: Path
    lm_config: LMConfig
    mimi_config: MimiConfig
    lm: LanguageModel | None
    mimi: Mimi | None
    tokenizer: TextTokenizer | None
    voices: VoiceLibrary
    silence_codes: tuple[int, ...]  # [8], what this codec makes of silence
    sine_codes: tuple[int, ...]  # [8], what it makes of a 440 Hz sine
    sampling: Sampling  # for whoever names no other: what it recommends, or the published values
    roles: tuple[SuggestedRole, ...]  # for whoever has none in mind; () where it suggests none
    weights_hash: str  # cheap and stable; see CheckpointFiles.weights_hash


def load_checkpoint(
    ref: str | Path = "demo",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    parts: frozenset[str] = ALL_PARTS,
) -> Checkpoint:
    """Loads the asked-for parts of a checkpoint onto `device`.

    ref: a folder, a Hugging Face repository id, "demo" or "demo-random" (see find_checkpoint).
    dtype: of the language model; by default bf16 on a GPU and fp32 on the CPU, where bf16 is emulated. Its norms
    and the codec are fp32 always.
    Raises CheckpointError: what is wrong, where, and what to do about it.
    """
    if not parts <= ALL_PARTS:
        raise ValueError(f"unknown parts {sorted(parts - ALL_PARTS)}; a checkpoint has {sorted(ALL_PARTS)}")
    files = find_checkpoint(ref)
    lm_config, mimi_config = _shapes(files)
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    # A checkpoint may say `"tokenizer": null` (one made for parity has no text); then it can take no role.
    reads_text = "text" in parts and files.config.get("tokenizer", True) is not None
    shapes = VoiceShapes(lm_config.dim, lm_config.card, lm_config.text_card)
    return Checkpoint(
        name=files.name,
        trained=bool(files.config.get("trained", True)),
        notice=str(files.config.get("notice", "")),
        folder=files.folder,
        lm_config=lm_config,
        mimi_config=mimi_config,
        lm=load_lm(files, lm_config, device, dtype) if "lm" in parts else None,
        mimi=load_mimi(files, mimi_config, device) if "mimi" in parts else None,
        tokenizer=load_tokenizer(files, lm_config) if reads_text else None,
        voices=VoiceLibrary(
            files.voices_folder,
            files.voices_archive,
            shapes,
            lambda: load_mimi(files, mimi_config, torch.device("cpu")),
        ),
        silence_codes=_codes(files, "silence_codes", PUBLISHED_SILENCE_CODES, lm_config),
        sine_codes=_codes(files, "sine_codes", PUBLISHED_SINE_CODES, lm_config),
        sampling=_sampling(files),
        roles=_roles(files),
        weights_hash=files.weights_hash,
    )


def load_lm(files: CheckpointFiles, config: LMConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The language model, without the depth transformer's user half: that is checked, but not read."""
    path = files.need(files.lm, "language model", LM_FILES)
    model = LanguageModel(config, device="meta", dtype=dtype)
    stored = stored_shapes(path)
    steps = stored_depth_steps(stored, config)
    check_shapes(stored, lm_shapes(model, steps), str(path))
    fill_module(model, path, device)
    return model.eval()


def load_mimi(files: CheckpointFiles, config: MimiConfig, device: torch.device) -> Mimi:
    """The codec, in fp32: bf16 flips codes."""
    path = files.need(files.mimi, "codec", MIMI_FILES)
    with torch.device("meta"):
        mimi = Mimi(config)
    check_shapes(stored_shapes(path), module_shapes(mimi), str(path))
    fill_module(mimi, path, device)
    return mimi.eval()


def load_tokenizer(files: CheckpointFiles, config: LMConfig) -> TextTokenizer:
    """The tokenizer, which may not know more tokens than the model."""
    path = files.need(files.tokenizer, "text tokenizer", TOKENIZER_FILES)
    tokenizer = TextTokenizer(path)
    if tokenizer.size > config.text_card:
        raise CheckpointError(
            f"{path} has {tokenizer.size} pieces, the model {config.text_card}: they do not belong together"
        )
    return tokenizer


def _shapes(files: CheckpointFiles) -> tuple[LMConfig, MimiConfig]:
    """Both configs. The published config.json says nothing of shapes: then the 7B ones hold."""
    try:
        return LMConfig.from_dict(_section(files, "lm")), MimiConfig.from_dict(_section(files, "mimi"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{files.folder / 'config.json'}: {error}") from error


def _sampling(files: CheckpointFiles) -> Sampling:
    try:
        return Sampling.from_dict(_section(files, "sampling"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{files.folder / 'config.json'}: {error}; correct it there or leave it out") from error


def _roles(files: CheckpointFiles) -> tuple[SuggestedRole, ...]:
    """`"roles": [{"name": "Café", "text": "You work for …"}]`, as a small model needs that knows but a few."""
    try:
        roles = tuple(SuggestedRole(**role) for role in files.config.get("roles", []))
    except TypeError:
        roles = None
    if roles is None or not all(isinstance(said, str) and said for role in roles for said in (role.name, role.text)):
        raise CheckpointError(
            f"{files.folder / 'config.json'}: 'roles' must be a list of objects with a name and a text, neither empty"
        )
    return roles


def _section(files: CheckpointFiles, key: str) -> Mapping[str, Any]:
    section = files.config.get(key, {})
    if not isinstance(section, dict):
        raise TypeError(f"{key!r} must be an object")
    return section


def _codes(files: CheckpointFiles, key: str, published: Sequence[int], config: LMConfig) -> tuple[int, ...]:
    codes = files.config.get(key, published)
    valid = isinstance(codes, Sequence) and len(codes) == AUDIO_CODEBOOKS
    if not valid or not all(isinstance(code, int) and 0 <= code < config.card for code in codes):
        raise CheckpointError(
            f"{files.folder / 'config.json'}: {key!r} must be {AUDIO_CODEBOOKS} codes in 0 … {config.card - 1}"
        )
    return tuple(codes)

"""A small checkpoint in the published form, written by the tests: all 16 depth steps, tokenizer, voices."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint_files import FORMAT
from models.checkpoint_tensors import lm_shapes
from models.config import CodecTransformerConfig, LMConfig, MimiConfig, QuantizerConfig, SeanetConfig
from models.demo_checkpoint import TOKENIZER, random_mimi
from models.lm import LanguageModel
from models.voices import write_codes

LM = LMConfig(
    dim=16,
    text_card=2_000,
    card=64,
    num_heads=2,
    num_layers=2,
    context=40,
    depformer_dim=8,
    depformer_dim_feedforward=32,
    depformer_num_heads=2,
    depformer_num_layers=2,
)
MIMI = MimiConfig(
    seanet=SeanetConfig(dimension=16, n_filters=2),
    transformer=CodecTransformerConfig(d_model=16, num_heads=2, num_layers=1, context=20, dim_feedforward=32),
    quantizer=QuantizerConfig(dimension=8, n_q=12, bins=64),
)


def lm_tensors(steps: int = 16) -> dict[str, Tensor]:
    """Random bf16 tensors of every name an LM file with that many depth steps holds."""
    generator = torch.Generator().manual_seed(5)
    shapes = lm_shapes(LanguageModel(LM, device="meta"), steps)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def config(**changes: Any) -> dict[str, Any]:
    codes = list(range(8))
    return {
        "format": FORMAT,
        "name": "small",
        "trained": False,
        "lm": dataclasses.asdict(LM),
        "mimi": dataclasses.asdict(MIMI),
        "silence_codes": codes,
        "sine_codes": codes[::-1],
        **changes,
    }


def write_small_checkpoint(
    folder: Path, *, lm: Mapping[str, Tensor] | None = None, settings: Mapping[str, Any] | None = None
) -> Path:
    """Writes the checkpoint into an existing folder, named as the published one names its files."""
    save_file(dict(lm if lm is not None else lm_tensors()), folder / "model.safetensors")
    save_file(random_mimi(MIMI), folder / "tokenizer-0123-checkpoint1.safetensors")
    (folder / "tokenizer_spm_2k.model").write_bytes(TOKENIZER.read_bytes())
    (folder / "config.json").write_text(json.dumps(settings if settings is not None else config()))
    write_archive(folder / "voices.tgz", {"voices/A.safetensors": write_codes(torch.arange(24).view(3, 8))})
    return folder


def write_archive(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

"""A run's resume state: tensors in small shards, and a JSON that names them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.folders import write_json

SHARD_BYTES = 15 << 20  # a shard stays below 16 MB, whatever carries it elsewhere
TOTAL_BYTES = 64 << 20


def save_state(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Saves a resume state as `state-<generation>-NN.safetensors` and `state.json`, shards below 16 MB.

    The new generation is complete before `state.json` names it, so a kill at any moment leaves a usable one.
    Raises ValueError if the state is over 64 MB: then it could not travel.
    """
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > TOTAL_BYTES:
        raise ValueError(f"the resume state is {total / 2**20:.1f} MiB; it has to stay below {TOTAL_BYTES >> 20}")
    folder.mkdir(parents=True, exist_ok=True)
    generation = f"{time.time_ns() // 1_000_000:x}"
    names = []
    for number, shard in enumerate(_shards(tensors)):
        names.append(f"state-{generation}-{number:02d}.safetensors")
        save_file(shard, folder / names[-1])
    write_json(folder / "state.json", {**about, "shards": names})
    for old in folder.glob("state-*.safetensors"):
        if old.name not in names:
            old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last saved state, or None if there is none."""
    index = folder / "state.json"
    if not index.exists():
        return None
    about: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for name in about.pop("shards"):
        tensors.update(load_file(folder / name))
    return _merge_pieces(tensors), about


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Packs tensors into shards; one larger than a shard is split along its first dimension (`name#piece`)."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        whole = tensor.detach().to("cpu").contiguous()
        size = whole.numel() * whole.element_size()
        pieces = [whole] if size <= SHARD_BYTES else list(whole.chunk(-(-size // SHARD_BYTES)))
        for number, piece in enumerate(pieces):
            own = piece.numel() * piece.element_size()
            if filled + own > SHARD_BYTES and shards[-1]:
                shards.append({})
                filled = 0
            # Clones: safetensors refuses tensors that share memory, as tied or chunked ones do.
            shards[-1][name if len(pieces) == 1 else f"{name}#{number:03d}"] = piece.clone()
            filled += own
    return shards


def _merge_pieces(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    pieces: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        base, mark, _ = name.partition("#")
        if mark:
            pieces.setdefault(base, []).append(tensors[name])
        else:
            merged[name] = tensors[name]
    merged.update({name: torch.cat(parts) for name, parts in pieces.items()})
    return merged

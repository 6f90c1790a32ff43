"""The published tensor names and shapes, and how a file's tensors get into a module one at a time.

What a file must hold follows from the module itself, plus the part that is stored but never run: the depth
transformer's user half (steps 8-15).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.checkpoint_files import CheckpointError
from models.checkpoint_int8 import ROW_SCALE, scale_problems, widen_rows
from models.config import AUDIO_CODEBOOKS, LMConfig

Shape = tuple[int, ...]

_PER_STEP = re.compile(r"(depformer\.layers\.\d+\.gating\.|depformer_in\.|linears\.)0(\..+)")
_STEP_EMBEDDING = re.compile(r"(depformer_emb\.)0(\..+)")
_STACKED = re.compile(r"depformer\.layers\.\d+\.self_attn\.(in_proj_weight|out_proj\.weight)")
_STORED = {"F64", "F32", "F16", "BF16", "I8"}


def module_shapes(module: nn.Module) -> dict[str, Shape]:
    """Name → shape of everything a module keeps."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def lm_shapes(model: nn.Module, depth_steps: int) -> dict[str, Shape]:
    """What an LM file of that many depth steps must hold: the model's tensors, and the user half if it is there."""
    expected = module_shapes(model)
    for name, shape in list(expected.items()):
        if _STACKED.fullmatch(name):
            expected[name] = (shape[0] // AUDIO_CODEBOOKS * depth_steps, *shape[1:])
        elif match := _PER_STEP.fullmatch(name):
            expected.update({f"{match[1]}{k}{match[2]}": shape for k in range(AUDIO_CODEBOOKS, depth_steps)})
        elif match := _STEP_EMBEDDING.fullmatch(name):
            expected.update({f"{match[1]}{k}{match[2]}": shape for k in range(AUDIO_CODEBOOKS - 1, depth_steps - 1)})
    return expected


def check_shapes(stored: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Raises CheckpointError that names every missing, superfluous and misshaped tensor of `where`."""
    problems = [f"missing: {name} {_text(shape)}" for name, shape in expected.items() if name not in stored]
    problems += [f"superfluous: {name} {_text(shape)}" for name, shape in stored.items() if name not in expected]
    problems += [
        f"misshaped: {name} is {_text(stored[name])}, expected {_text(shape)}"
        for name, shape in expected.items()
        if name in stored and tuple(stored[name]) != tuple(shape)
    ]
    if problems:
        raise CheckpointError(
            f"{where} does not fit the model in {len(problems)} tensors. Either config.json describes other weights "
            f"than these, or the file is incomplete: fetch it again.\n  " + "\n  ".join(sorted(problems))
        )


def stored_shapes(path: Path) -> dict[str, Shape]:
    """Name → shape of a safetensors file's weights, from its header alone; the scales of int8 rows are checked here.

    Raises CheckpointError.
    """
    with _open(path, "cpu") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # a file, not a dict
        kinds = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    if odd := sorted(f"{name} {dtype}" for name, (dtype, _) in kinds.items() if dtype not in _STORED):
        raise CheckpointError(f"{path} holds tensors that are neither floating point nor int8: {', '.join(odd)}")
    if problems := scale_problems(kinds):
        raise CheckpointError(f"{path} holds int8 rows that cannot be read; export it again: {'; '.join(problems)}")
    return {name: shape for name, (_, shape) in kinds.items() if not name.endswith(ROW_SCALE)}


def stored_depth_steps(stored: Mapping[str, Shape], config: LMConfig) -> int:
    """How many depth steps a file holds: Moshi-style files stop at the agent's eight, which is all that runs."""
    first_user_step = f"linears.{AUDIO_CODEBOOKS}.weight"
    return config.dep_q if first_user_step in stored else AUDIO_CODEBOOKS


def fill_module(module: nn.Module, path: Path, device: torch.device) -> None:
    """Gives a module that was built on the meta device its tensors, straight to `device`, one after the other.

    Beside the module itself at most one tensor exists at any time, so 16 GB of weights need 16 GB. A tensor gets
    the dtype its place in the module has, int8 rows by way of fp32. The file must have passed check_shapes.
    """
    places = dict(module.state_dict())
    with _open(path, str(device)) as file:
        for name in file.offset_keys():  # the order in the file: a network disk is then read in one go
            place = places.pop(name, None)
            if place is None:
                continue  # a part that never runs
            whole = tuple(file.get_slice(name).get_shape()) == tuple(place.shape)
            _put(module, name, _read(file, name, None if whole else place.shape[0]), place, whole, device)
    if places:
        raise CheckpointError(f"{path} left tensors of the model unset: {', '.join(sorted(places))}")
    unset = [name for name, tensor in _everything(module) if tensor.is_meta]
    if unset:
        raise CheckpointError(f"buffers that no file holds must be built on use, not on construction: {unset}")


def _read(file: Any, name: str, rows: int | None) -> Tensor:
    """A tensor of the file, or so many of its first rows; int8 widened to fp32."""
    tensor: Tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[:rows]
    return widen_rows(tensor, file.get_tensor(f"{name}{ROW_SCALE}")) if tensor.dtype == torch.int8 else tensor


def _put(module: nn.Module, name: str, tensor: Tensor, place: Tensor, whole: bool, device: torch.device) -> None:
    """Sets one parameter or buffer. On the CPU what was read is a view of the mapped file, so it is copied."""
    if device.type == "cpu" or not whole or tensor.dtype != place.dtype:
        value = torch.empty(place.shape, dtype=place.dtype, device=device).copy_(tensor)
    else:
        value = tensor
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _everything(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _open(path: Path, device: str) -> safe_open:
    try:
        return safe_open(path, framework="pt", device=device)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); fetch it again") from error


def _text(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"

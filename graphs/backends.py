"""Which attention a machine gets: the compiled one on a CPU that has numba, torch's operators everywhere else."""

from __future__ import annotations

import importlib.util
import logging

import torch

from graphs.attention import RowCache
from graphs.kv_cache import KVCache
from models.config import LMConfig

log = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "torch")


def make_cache(
    config: LMConfig,
    slots: int,
    tile: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
) -> KVCache:
    """Reserves full contexts for `slots` conversations, laid out as the chosen backend wants them.

    backend: one of BACKENDS. Raises ValueError for a name that is none, or a backend that cannot serve this model.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no attention backend {backend!r}, only {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "compiled" if _compiled_fits(config, device, dtype) else "torch"
    log.info("attention backend: %s", backend)
    if backend == "torch":
        return RowCache(config, slots, tile, device=device, dtype=dtype)
    if device.type != "cpu":
        raise ValueError(f"compiled attention runs on the CPU, not on {device}")
    from graphs.attention_cpu import ColumnCache

    return ColumnCache(config, slots, tile, dtype=dtype)


def default_dtype(device: torch.device) -> torch.dtype:
    """What a language model is loaded in where nobody says: bf16 wherever reading less is faster.

    On a CPU that is where the compiled step runs (it widens weights as it reads them; all arithmetic stays fp32).
    Torch's own bf16 products need instructions that many CPUs lack.
    """
    if device.type == "cpu" and importlib.util.find_spec("numba") is None:
        return torch.float32
    return torch.bfloat16


def _compiled_fits(config: LMConfig, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim % 8 == config.dim % 8 == config.depformer_dim % 8 == 0
        and importlib.util.find_spec("numba") is not None
    )

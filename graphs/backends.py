"""Which step a machine gets: on CUDA the captured one, on a CPU with numba the compiled one, else torch operators."""

from __future__ import annotations

import importlib.util
import logging

import torch

from graphs.attention import RowCache
from graphs.kv_cache import KVCache
from graphs.ring_cache import FP8, RingCache
from graphs.sampling import HAS_NUMBA
from models.config import LMConfig

log = logging.getLogger(__name__)

# static: the step of fixed shape, in Triton's kernels on CUDA and in torch operators on a CPU (for tests);
# static-fp8: the same with keys and values in fp8.
BACKENDS = ("auto", "compiled", "torch", "static", "static-fp8")


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
        backend = _best(config, device, dtype)
    log.info("attention backend: %s", backend)
    if backend.startswith("static"):
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise ValueError("the static step on CUDA needs the package triton: install the extra 'cuda'")
        stored = FP8 if backend == "static-fp8" else None
        return RingCache(config, slots, tile, device=device, dtype=dtype, stored=stored)
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
    if device.type == "cpu" and not HAS_NUMBA:
        return torch.float32
    return torch.bfloat16


def _best(config: LMConfig, device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        return "static" if importlib.util.find_spec("triton") is not None else "torch"
    return "compiled" if _compiled_fits(config, device, dtype) else "torch"


def _compiled_fits(config: LMConfig, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and config.head_dim % 8 == config.dim % 8 == config.depformer_dim % 8 == 0
        and HAS_NUMBA
    )

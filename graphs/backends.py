"""Which step, attention and products a machine gets, and how its keys and values are kept.

On CUDA the captured step, on a CPU with numba the compiled one, else torch operators. Attention and products have an
implementation of our own and, where installed, vLLM's; which serves is asked for by name, or found by graphs.self_test.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
from dataclasses import dataclass, replace

import torch

from graphs.attention import RowCache
from graphs.kv_cache import KEY_BLOCK, KVCache, round_up
from graphs.kv_pressure import RESERVE_S
from graphs.paging import pool_size
from graphs.ring_cache import FP8, RingCache
from graphs.sampling import HAS_NUMBA
from models.config import LMConfig

log = logging.getLogger(__name__)

# static: the step of fixed shape, in Triton's kernels on CUDA and in torch operators on a CPU (for tests);
# static-fp8: the same with keys and values in fp8.
BACKENDS = ("auto", "compiled", "torch", "static", "static-fp8")
ATTENTIONS = ("auto", "ours", "vllm")
LINEARS = ("auto", "ours", "int8", "onednn", "vllm", "vllm-int8", "vllm-fp8")
KV_DTYPES = ("auto", "bfloat16", "fp8")  # auto: as the model computes them


@dataclass(frozen=True)
class Backends:
    """What an operator can choose. `auto` for attention and linear: what the self-test finds right, stable and faster.

    kv_overcommit: how many times the full contexts that there is memory for are promised; above 1 the cache is paged.
    kv_reserve_s: how long every conversation must be able to go on in it when another is let in (graphs.kv_pressure).
    stable: as the self-test found it, whether a row's bits are its own in any company.
    """

    step: str = "auto"
    attention: str = "ours"
    linear: str = "ours"
    kv_dtype: str = "auto"
    kv_overcommit: float = 1.0
    kv_reserve_s: float = RESERVE_S
    stable: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError for a name that is none, and an overcommit below 1."""
        for what, name, names in (
            ("attention backend", self.step, BACKENDS),
            ("attention backend", self.attention, ATTENTIONS),
            ("linear backend", self.linear, LINEARS),
            ("KV dtype", self.kv_dtype, KV_DTYPES),
        ):
            if name not in names:
                raise ValueError(f"there is no {what} {name!r}, only {', '.join(names)}")
        if self.kv_overcommit < 1.0:
            raise ValueError(f"kv_overcommit is {self.kv_overcommit}: 1 reserves full contexts, 1.5 promises half more")

    @property
    def paged(self) -> bool:
        return self.kv_overcommit > 1.0

    @property
    def id(self) -> str:
        """Part of an engine's numerics_id: what of the choice decides bits, beside the cache's layout."""
        linear = "" if self.linear == "ours" else f"-lin.{self.linear}"
        stored = "" if self.kv_dtype == "auto" else f"-kv.{self.kv_dtype}"
        # Equal to nobody's, so that whoever moves a conversation says that its words may differ.
        return f"{linear}{stored}" if self.stable else f"{linear}{stored}-unstable.{secrets.token_hex(4)}"


def make_cache(
    config: LMConfig,
    slots: int,
    tile: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | Backends = "auto",
) -> KVCache:
    """Reserves memory for `slots` rings, laid out as the chosen backends want them: full contexts, or a pool of pages.

    backend: a step's name, one of BACKENDS, or all choices; an attention that is `auto` is taken to be ours. Raises
    ValueError for a name that is none, or a backend that cannot serve this model; ImportError if vLLM is asked for and
    not there.
    """
    chosen = resolve(Backends(step=backend) if isinstance(backend, str) else backend, config, device, dtype)
    log.info("step %s, attention %s, keys and values %s", chosen.step, chosen.attention, chosen.kv_dtype)
    pages = None
    if chosen.paged:
        pages = pool_size(slots, round_up(config.window + tile, KEY_BLOCK) // KEY_BLOCK, chosen.kv_overcommit)
    if chosen.step.startswith("static"):
        if chosen.attention == "vllm" and pages is None:  # it reads pages: as many as rings in one piece would have
            pages = pool_size(slots, round_up(config.window + tile, KEY_BLOCK) // KEY_BLOCK, 1.0)
        stored = FP8 if chosen.kv_dtype == "fp8" else None
        return RingCache(config, slots, tile, device=device, dtype=dtype, stored=stored, pages=pages)
    stored = torch.bfloat16 if chosen.kv_dtype == "bfloat16" else dtype
    if chosen.attention == "vllm":
        from graphs.vllm_cpu import VllmBlockCache

        return VllmBlockCache(config, slots, tile, dtype=stored, pages=pages)
    if chosen.step == "torch":
        return RowCache(config, slots, tile, device=device, dtype=stored, pages=pages)
    from graphs.attention_cpu import CompiledCache

    return CompiledCache(config, slots, tile, dtype=stored, pages=pages)


def resolve(wanted: Backends, config: LMConfig, device: torch.device, dtype: torch.dtype) -> Backends:
    """Settles what `auto` means for step and KV dtype, and refuses what does not go together.

    Raises ValueError, which says what does.
    """
    step, kv_dtype = wanted.step, wanted.kv_dtype
    if step == "auto":
        step = _best(config, device, dtype)
    if step == "static-fp8":
        step, kv_dtype = "static", "fp8"
    if kv_dtype == "fp8" and step != "static":
        raise ValueError(
            f"keys and values in fp8 are for CUDA with triton (here it is {device}, step {step!r}): choose bfloat16"
        )
    if kv_dtype == "bfloat16" and step == "static" and dtype != torch.bfloat16:
        raise ValueError(f"this step keeps keys and values as computed ({dtype}) or in fp8, not in bfloat16")
    if step == "static" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("the static step on CUDA needs the package triton: install the extra 'cuda'")
    if step == "compiled" and device.type != "cpu":
        raise ValueError(f"compiled attention runs on the CPU, not on {device}")
    if wanted.attention == "vllm" and device.type == "cpu" and step != "compiled":
        raise ValueError(f"on a CPU vLLM's attention serves the compiled step, which needs numba, not {step!r}")
    return replace(wanted, step=step, kv_dtype=kv_dtype)


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
        and config.dim % 2 == config.depformer_dim % 2 == 0
        and HAS_NUMBA
    )

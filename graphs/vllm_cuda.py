"""vLLM's kernels for CUDA in the step of fixed shape: flash attention over our pages, products in fp8.

UNRUN: read in vLLM 0.32.0's sources, tested against stand-ins that mean the same (tests/unit/graphs/test_vllm_cuda.py),
never run on a GPU. Whoever runs it first: the self-test compares it with our own kernels at start and refuses what is
wrong; what it gave belongs into docs/decisions/vllm-kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.ring_cache import FP8, RingCache
from graphs.sampling import SamplingRows
from graphs.spans import KEY_BLOCK, Span, round_up
from graphs.step_inputs import POSITION, QUERY_ROWS, Draws, Shape, StepInputs, blocks_of
from graphs.step_ops import StepOps, Turn
from graphs.trial import Trial, median_ms
from models.config import STREAMS, LMConfig
from models.layers import RMS_EPS, rope_rotation

HOPPER = 9  # from this generation on flash attention is its third version
SMALLEST = 1 << 20  # numbers of a weight; smaller ones, as the depth transformer's, gain less than the launches cost
FP8_MAX = 448.0
_BY_SIXTEENS = 16  # what CUTLASS wants of both sides of a weight


@dataclass(frozen=True)
class Kernels:
    """The three functions of vLLM that are called, as it has them."""

    flash_attn_varlen_func: Any
    scaled_fp8_quant: Any
    cutlass_scaled_mm: Any
    fa_version: int = 3


def kernels(device: torch.device) -> Kernels:
    """vLLM's, for this device. Raises ImportError, saying what to install."""
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"vLLM cannot be imported ({error}): pip install vllm==0.32.0, or choose `ours`") from error
    current_platform.import_kernels()
    version = 3 if torch.cuda.get_device_capability(device)[0] >= HOPPER else 2
    return Kernels(flash_attn_varlen_func, _custom_ops.scaled_fp8_quant, _custom_ops.cutlass_scaled_mm, version)


class VllmOps:
    """A StepOps that leaves to `base` what it does not do itself."""

    def __init__(self, base: StepOps, cache: RingCache, heads: int, found: Kernels, *, attention: bool, linear: bool):
        """attention: flash attention instead of ours; linear: large products in fp8.

        Raises ValueError for a cache that is not in pages, or in fp8: flash attention knows neither rings in one piece
        nor a scale for every key.
        """
        if attention and (cache.page_table is None or cache.scales is not None):
            raise ValueError("vLLM's attention reads keys and values in pages, as computed: not kv_dtype fp8")
        self._base, self._cache, self._heads, self._found = base, cache, heads, found
        self._attends, self._multiplies = attention, linear
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # address → fp8 [inputs, outputs] and scales [1, outputs]
        self._sequences: tuple[Tensor, Tensor, Tensor] | None = None
        self.embed, self.norm_of = base.embed, base.norm_of
        self.depth_attend, self.draw = base.depth_attend, base.draw

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        alpha: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """See StepOps.linear."""
        if not self._in_fp8(weight, out):
            return self._base.linear(x, weight, alpha=alpha, residual=residual, gated=gated, out=out)
        if alpha is not None:
            x = F.rms_norm(x.float(), alpha.shape, alpha, RMS_EPS).to(x.dtype)
        stored, scales = self._quantised(weight)
        coarse, row_scales = self._found.scaled_fp8_quant(x.contiguous(), use_per_token_if_dynamic=True)
        y: Tensor = self._found.cutlass_scaled_mm(coarse, stored, row_scales, scales, torch.bfloat16)
        if gated:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        return y if residual is None else residual + y

    def store(self, layer: int, packed: Tensor, rows: Tensor, turn: Turn) -> Tensor:
        """See StepOps.store: ours, which rotates as well."""
        return self._base.store(layer, packed, rows, turn)

    def attend(self, layer: int, packed: Tensor, rows: Tensor, blocks: Tensor, turn: Turn) -> Tensor:
        """See StepOps.attend."""
        if not self._attends:
            return self._base.attend(layer, packed, rows, blocks, turn)
        cache, count = self._cache, len(packed)
        if layer == 0:
            self._sequences = self._as_sequences(blocks)  # the same for all layers of a step
        assert self._sequences is not None
        starts, lengths, tables = self._sequences
        query = self.store(layer, packed, rows, turn).view(count, self._heads, -1)
        # [pages, heads, KEY_BLOCK, head_dim] as flash attention counts: only the last axis has to be contiguous.
        keys, values = cache.keys[layer].transpose(1, 2), cache.values[layer].transpose(1, 2)
        out = torch.zeros_like(query)  # rows of padding belong to no sequence
        self._found.flash_attn_varlen_func(
            q=query, k=keys, v=values, max_seqlen_q=QUERY_ROWS, cu_seqlens_q=starts,
            max_seqlen_k=tables.shape[1] * KEY_BLOCK, seqused_k=lengths, softmax_scale=query.shape[-1] ** -0.5,
            causal=True, window_size=[cache.window - 1, 0], block_table=tables, out=out,
            # Unsplit: how a row's keys are split would depend on how many rows there are.
            num_splits=1, fa_version=self._found.fa_version,
        )  # fmt: skip
        return out.view(count, -1)

    def _as_sequences(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What flash attention is told: row starts [n + 1], lengths [n] and pages [n, ring's + 1] of n sequences.

        A block of rows is a sequence that begins with the page of the oldest key its first row sees; pages follow in
        the order of positions (see graphs.vllm_cpu.VllmAttention, which does the same on the host). All int32.
        """
        cache = self._cache
        assert cache.page_table is not None
        count, slot, first = blocks[:, 1], blocks[:, 2], blocks[:, 3]
        oldest = (first - cache.window + 1).clamp(min=0) // KEY_BLOCK
        starts = F.pad(count.cumsum(0), (1, 0)).int()
        lengths = torch.where(count > 0, first + count - oldest * KEY_BLOCK, 0).int()
        reach = torch.arange(cache.blocks + 1, device=blocks.device)
        ring = (oldest.unsqueeze(1) + reach) % cache.blocks
        tables = cache.page_table[slot.long().unsqueeze(1), ring.long()].clamp(min=0)
        return starts, lengths, tables

    def _in_fp8(self, weight: Tensor, out: Tensor | None) -> bool:
        sides = all(side % _BY_SIXTEENS == 0 for side in weight.shape)
        return self._multiplies and out is None and sides and weight.numel() >= SMALLEST

    def _quantised(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Kept beside the weight itself: half as much memory again."""
        known = self._weights.get(weight.data_ptr())
        if known is None:
            full = weight.float()
            scales = (full.abs().amax(dim=1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            stored = (full / scales.unsqueeze(1)).to(FP8)
            known = self._weights[weight.data_ptr()] = (stored.t(), scales.unsqueeze(0))
        return known


# ---- tried at start -------------------------------------------------------------------------------------------------


def try_attention(
    config: LMConfig, slots: int, tile: int, device: torch.device, dtype: torch.dtype, bound: float
) -> Trial:
    """Flash attention over rings that are fresh, half full, sliding and wrapped, beside our own kernels.

    Raises ImportError without vLLM.
    """
    from graphs.triton_ops import TritonOps

    found, one = kernels(device), replace(config, num_layers=1)
    return compare_attention(one, slots, tile, device, dtype, found, TritonOps, bound)


def compare_attention(
    config: LMConfig,
    slots: int,
    tile: int,
    device: torch.device,
    dtype: torch.dtype,
    found: Kernels,
    ours: Callable[..., Any],
    bound: float,
) -> Trial:
    """ours: makes the StepOps of a cache."""
    heads, head_dim = config.num_heads, config.head_dim
    held = [3, config.window // 2, config.window, 2 * config.window + 77]
    cache = RingCache(config, len(held), tile, device=device, dtype=dtype, pages=len(held) * _blocks(config, tile))
    base = ours(cache, heads, head_dim)
    theirs = VllmOps(base, cache, heads, found, attention=True, linear=False)
    draw = torch.Generator().manual_seed(2)

    def run(ops: StepOps, spans: list[Span], packed: Tensor) -> Tensor:
        cache.cover(spans)
        rows, blocks = _told(spans, device)
        rotation = rope_rotation(rows[:, POSITION], head_dim, config.max_period).squeeze(1)
        return ops.attend(0, packed, rows, blocks, (rotation.real.contiguous(), rotation.imag.contiguous()))

    def packed_rows(count: int) -> Tensor:
        return torch.randn(count, 3 * config.dim, generator=draw).to(device=device, dtype=dtype)

    for slot, length in enumerate(held):
        for first in range(max(0, length - config.window), length, tile):
            count = min(tile, length - first)
            run(base, [Span(0, count, slot, first)], packed_rows(count))
    last = min(9, tile)
    mixed = [Span(0, 1, 0, held[0]), Span(1, 5, 1, held[1]), Span(6, 1, 2, held[2]), Span(7, last, 3, held[3])]
    packed = packed_rows(7 + last)
    wanted, got = run(base, mixed, packed).float(), run(theirs, mixed, packed)
    error = float((got.float() - wanted).norm() / wanted.norm())
    stable = all(
        torch.equal(run(theirs, [replace(span, start=0)], packed[part]), got[part])
        for span in mixed
        for part in [slice(span.start, span.start + span.count)]
    )
    live = [Span(i, 1, i % len(held), held[-1] + i // len(held)) for i in range(slots)]
    timed = packed_rows(slots)
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    spent = [median_ms(lambda ops=ops: run(ops, live, timed), finish) for ops in (base, theirs)]  # type: ignore[misc]
    return Trial("vllm", error, bound, stable, *spent)


def try_products(name: str, weights: Sequence[Tensor], slots: int, bound: float) -> Trial:
    """fp8 products over a layer's weights, beside ours. Raises ImportError without vLLM, ValueError for other names."""
    if name != "vllm-fp8":
        raise ValueError(f"on CUDA there are no products called {name!r}, only ours and vllm-fp8")
    from graphs.linear_triton import linear

    return compare_products(name, weights, slots, kernels(weights[0].device), linear, bound)


def compare_products(
    name: str, weights: Sequence[Tensor], slots: int, found: Kernels, ours: Callable[..., Tensor], bound: float
) -> Trial:
    """ours: StepOps.linear of our own."""
    draw, device = torch.Generator().manual_seed(1), weights[0].device
    theirs = VllmOps(_NoOps(), None, 1, found, attention=False, linear=True)  # type: ignore[arg-type] # only `linear`
    finish = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    error, stable, spent = 0.0, True, [0.0, 0.0]
    for weight in weights:
        if not theirs._in_fp8(weight, None):
            continue
        x = torch.randn(64 + slots, weight.shape[1], generator=draw).to(device=device, dtype=weight.dtype)
        exact, whole = x.float() @ weight.float().t(), theirs.linear(x, weight)
        error = max(error, float((whole.float() - exact).norm() / exact.norm()))
        for first, count in ((0, 1), (3, 2), (8, slots), (1, 63)):
            part = slice(first, first + count)
            stable = stable and torch.equal(theirs.linear(x[part], weight), whole[part])
        for i, product in enumerate((ours, theirs.linear)):
            spent[i] += median_ms(lambda run=product, w=weight, x=x[:slots]: run(x, w), finish)  # type: ignore[misc]
    return Trial(name, error, bound, stable, *spent)


class _NoOps:
    """What VllmOps leaves to others, where there are none."""

    def __getattr__(self, name: str) -> None:
        return None


def _blocks(config: LMConfig, tile: int) -> int:
    return round_up(config.window + tile, KEY_BLOCK) // KEY_BLOCK


def _told(spans: list[Span], device: torch.device) -> tuple[Tensor, Tensor]:
    """A step's rows and blocks for the device."""
    count = sum(span.count for span in spans)
    shape = Shape(count, blocks_of(spans), 0)
    inputs = StepInputs(shape, device)
    nothing = SamplingRows(*(np.zeros(0, dtype) for dtype in (np.float32, int, np.float32, int, int, int)))
    draws = Draws(np.zeros(0, dtype=np.int64), np.zeros((0, 9), dtype=np.int64), nothing)
    inputs.fill(shape, np.zeros((count, STREAMS), dtype=np.int16), spans, draws, [])
    rows, blocks, _ = inputs.views(shape)
    return rows, blocks

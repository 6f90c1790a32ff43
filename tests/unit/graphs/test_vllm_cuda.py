"""vLLM's CUDA kernels, which nobody here can run: what they are told, by stand-ins that do what their sources say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphs.backends import Backends, make_cache
from graphs.ring_cache import FP8, RingCache
from graphs.spans import KEY_BLOCK
from graphs.step_ops import TorchOps, torch_linear
from graphs.vllm_cuda import SMALLEST, Kernels, VllmOps, compare_attention, compare_products, kernels
from models.config import LMConfig
from tests.unit.graphs.small import SMALL

CPU = torch.device("cpu")


def flash_attention(
    *, q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int, seqused_k: Tensor,
    softmax_scale: float, causal: bool, window_size: list[int], block_table: Tensor, out: Tensor, num_splits: int,
    fa_version: int,
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func over pages: query i of n over L keys sees those from i + L - n - left to i + L - n."""
    assert causal
    assert num_splits == 1
    assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
    assert cu_seqlens_q.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert k.shape[1] == KEY_BLOCK
    for i, length in enumerate(seqused_k.tolist()):
        start, stop = int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1])
        count = stop - start
        assert count <= max_seqlen_q
        assert length <= max_seqlen_k
        if not count:
            continue
        pages = block_table[i, : -(-length // KEY_BLOCK)].long()
        keys, values = (ring[pages].flatten(0, 1)[:length].float() for ring in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * softmax_scale
        row = torch.arange(count).unsqueeze(1) + length - count
        key = torch.arange(length)
        seen = (key <= row + window_size[1]) & (key >= row - window_size[0])
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", shares, values).to(out.dtype)
    return out


def fp8_rows(x: Tensor, *, use_per_token_if_dynamic: bool) -> tuple[Tensor, Tensor]:
    """scaled_fp8_quant with a scale a row."""
    assert use_per_token_if_dynamic
    scale = x.float().abs().amax(dim=1, keepdim=True) / 448.0
    return (x.float() / scale).to(FP8), scale


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """cutlass_scaled_mm: b [inputs, outputs] by columns, as CUTLASS wants it."""
    assert a.dtype == b.dtype == FP8
    assert b.stride(0) == 1
    return ((scale_a * a.float()).double() @ (scale_b * b.float()).double()).to(out_dtype)


FOUND = Kernels(flash_attention, fp8_rows, scaled_product)


def torch_ops(cache: RingCache, heads: int, head_dim: int) -> TorchOps:
    return TorchOps(cache, heads)


@pytest.mark.parametrize("context", [450, 640, 641])
def test_flash_attention_over_rings_that_wrap(context: int) -> None:
    """Fresh, half full, sliding, wrapped twice; several rows of a slot; a window that is a whole number of pages."""
    config = replace(SMALL, context=context, num_layers=1)
    tried = compare_attention(config, 4, 64, CPU, torch.float32, FOUND, torch_ops, 1e-5)
    assert tried.right, tried
    assert tried.stable, tried


def test_a_window_that_is_off_by_one_is_found_out() -> None:
    def off(**given: Any) -> Tensor:
        left, right = given.pop("window_size")
        return flash_attention(window_size=[left - 1, right], **given)

    tried = compare_attention(
        replace(SMALL, num_layers=1),
        4,
        64,
        CPU,
        torch.float32,
        replace(FOUND, flash_attn_varlen_func=off),
        torch_ops,
        1e-3,
    )
    assert not tried.right


def test_products_in_fp8() -> None:
    """Large weights alone; norm, gate and residual as around our own."""
    draw = torch.Generator().manual_seed(1)
    weight = (torch.randn(2048, 1024, generator=draw) / 32).bfloat16()
    tried = compare_products("vllm-fp8", [weight, weight[:160]], 4, FOUND, torch_linear, 0.06)
    assert 0.01 < tried.error < 0.06
    assert tried.stable
    cache = make_cache(SMALL, 1, 8, device=CPU, dtype=torch.float32, backend="static")
    assert isinstance(cache, RingCache)
    ops = VllmOps(TorchOps(cache, 2), cache, 2, FOUND, attention=False, linear=True)
    x, alpha = torch.randn(5, 1024, generator=draw).bfloat16(), 1 + torch.randn(1024, generator=draw) / 10
    residual = torch.randn(5, 2048, generator=draw).bfloat16()
    for given in ({"alpha": alpha}, {"residual": residual}, {"alpha": alpha, "gated": True}):
        got, wanted = ops.linear(x, weight, **given), torch_linear(x, weight, **given)  # type: ignore[arg-type]
        assert float((got.float() - wanted.float()).norm() / wanted.float().norm()) < 0.06
    small = weight[:16, :32].contiguous()
    assert small.numel() < SMALLEST
    assert torch.equal(ops.linear(x[:, :32], small), F.linear(x[:, :32], small)), "small ones stay ours"


def test_what_flash_attention_cannot_read_is_refused() -> None:
    for backend, why in (
        (Backends(step="static"), "in pages"),
        (Backends(step="static-fp8", kv_overcommit=1.5), "fp8"),
    ):
        cache = make_cache(SMALL, 2, 8, device=CPU, dtype=torch.float32, backend=backend)
        assert isinstance(cache, RingCache)
        with pytest.raises(ValueError, match=why):
            VllmOps(TorchOps(cache, 2), cache, 2, FOUND, attention=True, linear=False)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install vllm==0\.32\.0, or choose `ours`"):
        kernels(CPU)


@pytest.mark.gpu
def test_on_a_gpu_that_has_vllm() -> None:
    """The self-test itself, on the published shape: to be run where somebody has both."""
    pytest.importorskip("vllm", reason="vllm is not installed (extra `vllm`)")
    from graphs.vllm_cuda import try_attention

    tried = try_attention(LMConfig(), 32, 64, torch.device("cuda"), torch.bfloat16, 0.02)
    print(tried)
    assert tried.right, tried

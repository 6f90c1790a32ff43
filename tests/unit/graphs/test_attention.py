"""Attention over rings: right against a plain reference, and the same bits however rows are grouped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.backends import make_cache
from graphs.kv_cache import KVCache, Span
from models.config import LMConfig

CONFIG = LMConfig(dim=128, num_heads=2, num_layers=1, context=450, depformer_dim=16)
TILE = 64
KINDS = [("torch", torch.float32), ("compiled", torch.float32), ("compiled", torch.bfloat16)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{str(kind[1])[6:]}")
Kind = tuple[str, torch.dtype]


def cache_of(kind: Kind, slots: int) -> KVCache:
    return make_cache(CONFIG, slots, TILE, device=torch.device("cpu"), dtype=kind[1], backend=kind[0])


class History:
    """Every key and value a slot was ever given, to attend to without a ring."""

    def __init__(self, seed: int, length: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (length, CONFIG.num_heads, CONFIG.head_dim)
        self.q, self.k, self.v = (torch.randn(shape, generator=draw) for _ in range(3))
        if dtype == torch.bfloat16:  # what is stored, so that the reference sees the same numbers
            self.k, self.v = self.k.bfloat16().float(), self.v.bfloat16().float()

    def expected(self, position: int) -> Tensor:
        first = max(0, position - CONFIG.window + 1)
        q, k, v = (
            self.q[position].double(),
            self.k[first : position + 1].double(),
            self.v[first : position + 1].double(),
        )
        scores = torch.einsum("hd,khd->hk", q, k) * CONFIG.head_dim**-0.5
        return torch.einsum("hk,khd->hd", scores.softmax(-1), v).float()


def run_chunks(kind: Kind, history: History, slot: int, chunks: list[int]) -> Tensor:
    """Feeds a history chunk by chunk into `slot` of a cache of its own; returns [length, heads, head_dim]."""
    cache = cache_of(kind, slot + 1)
    outputs, first = [], 0
    for count in chunks:
        rows = slice(first, first + count)
        attend = cache.attention([Span(0, count, slot, first)])
        outputs.append(attend(0, history.q[rows], history.k[rows], history.v[rows]))
        first += count
    return torch.cat(outputs)


def cut(length: int, sizes: list[int]) -> list[int]:
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(min(sizes[len(chunks) % len(sizes)], length - sum(chunks)))
    return chunks


@every_kind
@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, TILE), min_size=1, max_size=8), st.integers(1, 1100), st.integers(0, 3))
def test_any_chunking_gives_the_same_bits_and_the_right_values(
    kind: Kind, sizes: list[int], length: int, slot: int
) -> None:
    """1,100 positions wrap the ring of 640 keys once, and the window of 449 slides."""
    history = History(length, length, kind[1])
    frame_by_frame = run_chunks(kind, history, 0, [1] * length)
    chunked = run_chunks(kind, history, slot, cut(length, sizes))
    assert torch.equal(frame_by_frame, chunked)
    for position in {0, length // 2, length - 1}:
        torch.testing.assert_close(chunked[position], history.expected(position), atol=2e-6, rtol=1e-5)


@every_kind
def test_spans_of_several_slots_do_not_see_each_other(kind: Kind) -> None:
    one, other = History(1, 40), History(2, 40)
    cache = cache_of(kind, 3)
    attend = cache.attention([Span(0, 40, 2, 0), Span(40, 40, 0, 0)])
    together = attend(0, torch.cat((one.q, other.q)), torch.cat((one.k, other.k)), torch.cat((one.v, other.v)))
    assert torch.equal(together[:40], run_chunks(kind, one, 0, [40]))
    assert torch.equal(together[40:], run_chunks(kind, other, 0, [40]))


@every_kind
def test_a_freed_ring_leaks_nothing_to_its_next_owner(kind: Kind) -> None:
    cache = cache_of(kind, 1)
    cache.keys.fill_(3.0)
    cache.values.fill_(7.0)
    history = History(3, 30)
    outputs = cache.attention([Span(0, 30, 0, 0)])(0, history.q, history.k, history.v)
    assert torch.equal(outputs, run_chunks(kind, history, 0, [30]))


@every_kind
def test_a_snapshot_moves_between_slots(kind: Kind) -> None:
    cache = cache_of(kind, 2)
    history = History(4, 21)
    cache.attention([Span(0, 20, 0, 0)])(0, history.q[:20], history.k[:20], history.v[:20])
    cache.restore(1, cache.snapshot(0))
    last = (history.q[20:], history.k[20:], history.v[20:])
    stayed = cache.attention([Span(0, 1, 0, 20)])(0, *last)
    moved = cache.attention([Span(0, 1, 1, 20)])(0, *last)
    assert torch.equal(stayed, moved)


def test_a_backend_that_does_not_fit_says_why() -> None:
    def make(backend: str, dtype: torch.dtype = torch.float32) -> KVCache:
        return make_cache(CONFIG, 1, TILE, device=torch.device("cpu"), dtype=dtype, backend=backend)

    with pytest.raises(ValueError, match="no attention backend 'fast'"):
        make("fast")
    with pytest.raises(ValueError, match="stores bf16 or fp32, not torch"):
        make("compiled", dtype=torch.float16)
    assert type(make("auto", dtype=torch.float16)).__name__ == "RowCache"

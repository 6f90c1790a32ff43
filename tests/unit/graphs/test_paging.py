"""Pages: none owned twice, none lost, and the bits of rings in one piece."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from graphs.backends import Backends, make_cache
from graphs.frame_step import GENERATED, Emit, FrameStep
from graphs.kv_cache import KVCache
from graphs.paging import NO_PAGE, OutOfPages, PagePool, pages_for, pool_size
from graphs.sampling import HAS_NUMBA
from graphs.spans import KEY_BLOCK, Span
from graphs.stages import Sampling
from models.config import STREAMS, UNGENERATED
from models.lm import LanguageModel
from tests.unit.graphs.small import SMALL, small_model

BLOCKS, RINGS = 5, 4
TILE = 64


class Pool(RuleBasedStateMachine):
    """Rings that grow, wrap and end, in any order, against a plain account of who should hold what."""

    @initialize(pages=st.integers(BLOCKS, BLOCKS * RINGS))
    def begin(self, pages: int) -> None:
        self.pool = PagePool(pages, RINGS, BLOCKS)
        self.written: dict[int, set[int]] = {ring: set() for ring in range(RINGS)}
        self.next = dict.fromkeys(range(RINGS), 0)

    @rule(counts=st.lists(st.integers(0, 300), min_size=RINGS, max_size=RINGS))
    def step(self, counts: list[int]) -> None:
        spans = [Span(0, count, ring, self.next[ring]) for ring, count in enumerate(counts) if count]
        wanted = {
            ring: {position // KEY_BLOCK % BLOCKS for position in range(self.next[ring], self.next[ring] + count)}
            for ring, count in enumerate(counts)
        }
        needed = sum(len(wanted[ring] - self.written[ring]) for ring in range(RINGS))
        assert needed == sum(self.pool.missing(span.slot, span.first, span.count) for span in spans)
        before = self.pool.table.copy()
        if needed > self.pool.free:
            with pytest.raises(OutOfPages):
                self.pool.cover(spans)
            assert np.array_equal(self.pool.table, before), "a step that was refused took pages"
            return
        self.pool.cover(spans)
        held = before != NO_PAGE
        assert np.array_equal(self.pool.table[held], before[held]), "a page moved under its keys"
        for ring, count in enumerate(counts):
            self.written[ring] |= wanted[ring]
            self.next[ring] += count

    @rule(ring=st.integers(0, RINGS - 1))
    def end(self, ring: int) -> None:
        assert self.pool.release(ring) == len(self.written[ring])
        self.written[ring], self.next[ring] = set(), 0

    @invariant()
    def every_page_has_one_place(self) -> None:
        if not hasattr(self, "pool"):
            return
        owned = self.pool.table[self.pool.table != NO_PAGE].tolist()
        assert max(Counter([*owned, *self.pool._free]).values()) == 1, "owned twice, or owned and free"
        assert len(owned) + self.pool.free == self.pool.pages, "leaked"
        for ring, blocks in self.written.items():
            assert set(np.flatnonzero(self.pool.table[ring] != NO_PAGE)) == blocks
            assert self.pool.held(ring) == len(blocks)
            if self.next[ring] <= BLOCKS * KEY_BLOCK:
                assert len(blocks) == pages_for(self.next[ring], BLOCKS)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_how_large_a_pool_is() -> None:
    assert pool_size(10, 24, 1.0) == 240
    assert pool_size(10, 24, 1.5) == 160
    assert pool_size(1, 24, 4.0) == 24, "one full context always fits"
    with pytest.raises(ValueError, match=r"overcommit is 0\.5"):
        pool_size(1, 24, 0.5)
    with pytest.raises(ValueError, match="less than one full context"):
        PagePool(4, 2, 5)


# ---- the same bits in pages -------------------------------------------------------------------------------------

KINDS = [
    ("torch", torch.float32, "auto"),
    ("static", torch.float32, "auto"),
    ("static", torch.float32, "fp8"),
    *([("compiled", torch.float32, "auto"), ("compiled", torch.bfloat16, "auto")] if HAS_NUMBA else []),
]
Kind = tuple[str, torch.dtype, str]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{str(kind[1])[6:]}-{kind[2]}")


def cache_of(kind: Kind, slots: int, overcommit: float) -> KVCache:
    step, dtype, kv_dtype = kind
    chosen = Backends(step=step, kv_dtype=kv_dtype, kv_overcommit=overcommit)
    return make_cache(SMALL, slots, TILE, device=torch.device("cpu"), dtype=dtype, backend=chosen)


def run_rings(model: LanguageModel, cache: KVCache, lengths: list[int], sizes: list[int]) -> np.ndarray:
    """Feeds each slot so many columns, in pieces beside each other, and draws after every piece."""
    step = FrameStep(model, cache)
    logits: list[torch.Tensor] = []
    step.probe = lambda text, audio: logits.extend((text.flatten(), audio.flatten()))
    done, turn = [0] * len(lengths), 0
    while any(have < want for have, want in zip(done, lengths, strict=True)):
        spans, rows, emits, start = [], [], [], 0
        for slot, want in enumerate(lengths):
            count = min(sizes[(turn + slot) % len(sizes)], want - done[slot], TILE // len(lengths))
            if count <= 0:
                continue
            dice = np.random.default_rng(1000 * slot + done[slot])
            rows.append(dice.integers(0, SMALL.card, (count, STREAMS)).astype(np.int16))
            spans.append(Span(start, count, slot, done[slot]))
            free = np.full(GENERATED, UNGENERATED, dtype=np.int16)
            emits.append(Emit(start + count - 1, done[slot] + count, free, Sampling(), slot))
            start, done[slot] = start + count, done[slot] + count
        turn += 1
        logits.append(torch.from_numpy(step.run(np.concatenate(rows), spans, emits).astype(np.float32)).flatten())
    return torch.cat(logits).numpy()


@every_kind
@settings(max_examples=3, deadline=None)
@given(
    st.lists(st.integers(1, 800), min_size=3, max_size=3),
    st.lists(st.integers(1, 21), min_size=1, max_size=4),
)
def test_pages_hold_the_bits_of_rings_in_one_piece(kind: Kind, lengths: list[int], sizes: list[int]) -> None:
    """Up to 800 columns wrap a ring of 640; pages are taken in an order that no ring would have them in."""
    model = small_model(kind[1])
    whole = cache_of(kind, 3, 1.0)
    paged = cache_of(kind, 4, 4 / 3)
    assert whole.pool is None
    assert paged.pool is not None
    assert paged.pool.pages == 3 * 5
    assert paged.bytes_per_slot == whole.bytes_per_slot
    paged.cover([Span(0, 200, 3, 0)])  # somebody else was here first
    paged.release(3)
    expected = run_rings(model, whole, lengths, sizes)
    assert np.array_equal(run_rings(model, paged, lengths, sizes), expected)
    for slot, length in enumerate(lengths):
        frames = min(length, whole.capacity)
        mine, theirs = paged.read(slot, frames), whole.read(slot, frames)
        assert mine.bytes == theirs.bytes
        for name in ("keys", "values", "scales")[: 2 + hasattr(mine, "scales")]:
            got, wanted = getattr(mine, name), getattr(theirs, name)
            assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


@every_kind
def test_a_part_moves_between_pages_and_rings(kind: Kind) -> None:
    model = small_model(kind[1])
    whole, paged = cache_of(kind, 1, 1.0), cache_of(kind, 2, 1.5)
    run_rings(model, whole, [300], [60])
    paged.cover([Span(0, 100, 1, 0)])
    paged.write(0, whole.read(0, 290))
    assert paged.pool is not None
    assert paged.pool.held(0) == 3
    back = paged.read(0, 290)
    assert torch.equal(back.keys.view(torch.uint8), whole.read(0, 290).keys.view(torch.uint8))
    paged.release(0)
    paged.cover([Span(0, 500, 1, 100)])
    with pytest.raises(OutOfPages, match="needs 5 pages of 128 frames, 1 are free"):
        paged.write(0, whole.read(0, 640))

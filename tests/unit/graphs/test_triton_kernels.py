# ruff: noqa: E402  (kernels load after the environment says whether they are interpreted)
"""The CUDA kernels against torch's operators: on a GPU where there is one, else in Triton's interpreter.

The interpreter multiplies no bf16 (its results there are noise), so on a CPU all is fp32; it also accepts what the
compiler refuses, hence the last test. Both need the package triton: `pip install triton==3.9.0` beside a CPU torch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules load
if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "the package triton is not installed (`make kernels` does, or the extra `cuda`)", allow_module_level=True
    )

from graphs import linear_triton
from graphs.cuda_step import StaticStep
from graphs.kv_cache import Span
from graphs.ring_cache import FP8, RingCache
from graphs.sampling import SamplingRows
from graphs.slot_engine import SlotEngine
from graphs.stages import Sampling
from graphs.step_inputs import POSITION, SLOT, Draws, Shape, StepInputs, blocks_of
from graphs.step_ops import TorchOps, torch_linear
from graphs.triton_ops import TritonOps
from models.config import LMConfig
from models.layers import rope_rotation
from tests.golden import golden_prompt, prefill, random_user, talk
from tests.unit.graphs.forced import golden_lm_on

pytestmark = pytest.mark.gpu if CUDA else []  # `make gpu` runs them on the device
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Heads of 40: not a power of two. A window of 450 wraps a ring of 512 + 384 … two pieces and a block at a time.
CONFIG = LMConfig(dim=80, num_heads=2, num_layers=1, context=450, depformer_dim=16)
TILE = 64
fp8_or_not = pytest.mark.parametrize("stored", [None, FP8], ids=["as-computed", "fp8"])
NOBODY_DRAWS = Draws(
    np.zeros(0, dtype=np.int64),
    np.zeros((0, 9), dtype=np.int64),
    SamplingRows(*(np.zeros(0, dtype) for dtype in (np.float32, int, np.float32, int, int, int))),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Told:
    """A step's tables for the device."""

    def __init__(self, spans: list[Span], padding: int = 0) -> None:
        self.spans, self.count, self.padding = spans, sum(span.count for span in spans), padding
        shape = Shape(self.count + padding, blocks_of(spans) + padding, 0)
        inputs = StepInputs(shape, DEVICE)
        inputs.fill(shape, np.zeros((self.count, 17), dtype=np.int16), spans, NOBODY_DRAWS, [])
        self.rows, self.blocks, _ = inputs.views(shape)
        rotation = rope_rotation(self.rows[:, POSITION], CONFIG.head_dim, CONFIG.max_period).squeeze(1)
        self.turn = rotation.real.contiguous(), rotation.imag.contiguous()

    def padded(self, packed: Tensor) -> Tensor:
        return torch.cat((packed, packed.new_full((self.padding, packed.shape[1]), float("nan"))))


class Rings:
    """A cache with its operations."""

    def __init__(self, kind: type[TritonOps | TorchOps], stored: torch.dtype | None, pages: int | None = None) -> None:
        self.cache = RingCache(CONFIG, 3, TILE, device=DEVICE, dtype=torch.float32, stored=stored, pages=pages)
        heads, head_dim = CONFIG.num_heads, CONFIG.head_dim
        self.ops = TritonOps(self.cache, heads, head_dim) if kind is TritonOps else TorchOps(self.cache, heads)

    def step(self, told: Told, packed: Tensor) -> Tensor:
        self.cache.cover(told.spans)
        return self.ops.attend(0, packed, told.rows, told.blocks, told.turn)

    def fill(self, slot: int, frames: int, seed: int) -> None:
        """Frames 0 … frames - 1 of a slot, in pieces of a tile."""
        packed = normal(frames, 3 * CONFIG.dim, seed=seed)
        for first in range(0, frames, TILE):
            piece = packed[first : first + TILE]
            self.step(Told([Span(0, len(piece), slot, first)]), piece)

    def copy(self, other: Rings) -> None:
        """Takes over what another of the same layout holds, its pages as well."""
        if other.cache.pool is not None and self.cache.pool is not None:
            self.cache.pool.table[:] = other.cache.pool.table
            self.cache.pool.changed = True
            self.cache.cover([])
        self.cache.keys.copy_(other.cache.keys)
        self.cache.values.copy_(other.cache.values)
        if self.cache.scales is not None:
            self.cache.scales.copy_(other.cache.scales)


@pytest.fixture
def ordered_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products by BLAS give a row other bits at another place of a tile; these do not."""

    def product(left: np.ndarray, right: np.ndarray, dtype: object = None) -> np.ndarray:
        return np.einsum("ik,kj->ij", left, right)

    if not CUDA:
        monkeypatch.setattr(np, "matmul", product)


@fp8_or_not
@pytest.mark.parametrize("pages", [None, 15], ids=["rings", "pages"])
@pytest.mark.parametrize("held", [0, 1, 200, 449, 700], ids=lambda held: f"{held}-held")
def test_attention_over_rings(stored: torch.dtype | None, held: int, pages: int | None) -> None:
    """A live row, a chunk of 20, padding: before the window is full, when it slides, after the ring has wrapped."""
    told = Told([Span(0, 1, 2, held), Span(1, 20, 0, held)], padding=3)
    packed = told.padded(normal(21, 3 * CONFIG.dim, seed=held))
    rings = Rings(TorchOps, stored, pages)
    rings.fill(2, held, 1)
    rings.fill(0, held, 2)
    mine = Rings(TritonOps, stored, pages)
    expected = rings.step(told, packed)
    mine.copy(rings)
    attention = mine.ops._attention
    query = attention.store(0, packed, told.rows, SLOT, told.turn)
    for name in ("keys", "values"):
        got, wanted = getattr(mine.cache, name).float(), getattr(rings.cache, name).float()
        if stored is not None:  # where the interpreter rounds up to a power of two, it forgets to carry
            wanted = torch.where(wanted.abs().log2() % 1 == 0, got, wanted)
        # A rotation that differs in the last bit may round to the neighbour in fp8.
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0.0 if stored is None else 0.13)
    if stored is not None:
        assert torch.equal(mine.cache.scales, rings.cache.scales)
    mine.copy(rings)
    got = attention.attend(0, query, told.rows, SLOT, told.blocks)
    torch.testing.assert_close(got[:21], expected[:21], atol=2e-6, rtol=0)
    assert torch.equal(got[21:], torch.zeros_like(got[21:]))


@fp8_or_not
@pytest.mark.usefixtures("ordered_sums")
def test_attention_gives_a_row_the_same_bits_in_any_company(stored: torch.dtype | None) -> None:
    """Frames around the places where a piece of the ring ends and the window begins to slide."""
    packed = normal(24, 3 * CONFIG.dim, seed=9)
    for first in (372, 440):
        one_by_one, chunked = Rings(TritonOps, stored), Rings(TritonOps, stored)
        filled = Rings(TorchOps, stored)
        filled.fill(1, first, 5)
        one_by_one.copy(filled)
        chunked.copy(filled)
        single = [one_by_one.step(Told([Span(0, 1, 1, first + i)]), packed[i : i + 1]) for i in range(24)]
        pieces, done = [], 0
        for count in (18, 1, 5):
            told = Told([Span(0, 3, 0, done), Span(3, count, 1, first + done)], padding=2)
            rows = torch.cat((normal(3, 3 * CONFIG.dim, seed=done), packed[done : done + count]))
            pieces.append(chunked.step(told, told.padded(rows))[3 : 3 + count])
            done += count
        assert torch.equal(torch.cat(single), torch.cat(pieces))


@fp8_or_not
@pytest.mark.usefixtures("ordered_sums")
def test_pages_give_the_bits_of_rings_in_one_piece(stored: torch.dtype | None) -> None:
    """Two slots that grow in turn, so that their pages alternate, to beyond the ring's wrap."""
    whole, paged = Rings(TritonOps, stored), Rings(TritonOps, stored, 15)
    for first in (*range(0, 640, TILE), 640, 660):
        count = min(TILE, 20 if first >= 640 else TILE)
        told = Told([Span(0, count, 2, first), Span(count, count, 1, first)])
        packed = normal(2 * count, 3 * CONFIG.dim, seed=first)
        assert torch.equal(whole.step(told, packed), paged.step(told, packed))
    pool = paged.cache.pool
    assert pool is not None
    assert pool.table[2].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("inputs", [48, 200])
def test_linear_with_all_that_surrounds_it(rows: int, inputs: int) -> None:
    x, alpha = normal(rows, inputs), 1 + normal(inputs, seed=1) / 10
    weight, residual = normal(88, inputs, seed=2) / inputs**0.5, normal(rows, 44, seed=3)
    plain = linear_triton.linear(x, weight, out=torch.empty(rows, 100, device=DEVICE)[:, :88])
    torch.testing.assert_close(plain, torch_linear(x, weight), atol=1e-5, rtol=0)
    for gated in (False, True):
        matrix = weight if gated else weight[:44]
        got = linear_triton.linear(x, matrix, alpha=alpha, residual=residual, gated=gated)
        expected = torch_linear(x, matrix, alpha=alpha, residual=residual, gated=gated)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("ordered_sums")
def test_linear_gives_a_row_the_same_bits_at_any_count() -> None:
    x, weight, alpha = normal(70, 200), normal(48, 200, seed=1), 1 + normal(200, seed=2) / 10
    whole = linear_triton.linear(x, weight, alpha=alpha, gated=True)
    for rows in (1, 4, 33, 64):
        some = linear_triton.linear(x[70 - rows :].contiguous(), weight, alpha=alpha, gated=True)
        assert torch.equal(some, whole[70 - rows :])


def test_the_whole_step_draws_what_torch_draws() -> None:
    """Two conversations at default temperatures, the second's prompt beside the first one's frames."""
    model = golden_lm_on(DEVICE)
    heard = []
    for kind in (TorchOps, TritonOps):
        engine = SlotEngine(model, 2, tile=32, backend="static")
        cache = engine.cache
        assert isinstance(cache, RingCache)
        heads, head_dim = model.config.num_heads, model.config.head_dim
        ops = TritonOps(cache, heads, head_dim) if kind is TritonOps else TorchOps(cache, heads)
        engine.frame_step._model = StaticStep(model, cache, ops, capture=False)
        prefill(engine, 1, golden_prompt(), Sampling(), 8)
        engine.open(0, golden_prompt(), Sampling(1.0, 90, 1.2, 512), 2**62 + 9)
        frames = talk(engine, 1, random_user(1, 0))
        out = engine.step([0, 1], random_user(2, 7))
        heard.append((np.concatenate((frames, out.tokens)), cache.keys.clone(), cache.values.clone()))
    (expected, keys, values), (got, got_keys, got_values) = heard
    assert np.array_equal(expected, got)
    torch.testing.assert_close(got_keys, keys, atol=5e-6, rtol=0)
    torch.testing.assert_close(got_values, values, atol=5e-6, rtol=0)


@pytest.mark.skipif(CUDA, reason="on a GPU the tests above compile every kernel")
def test_kernels_compile_for_an_h100_without_spilling_much() -> None:
    """At the 7B shape: tensor cores in every product, shared memory within the limit."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels"],
        cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line[:20].strip(): line[20:] for line in done.stdout.splitlines()}
    for name in ("in_proj", "gate_in", "gate_out", "text head", "depth gate_in", "attend bf16", "attend fp8e4nv"):
        assert "products   0" not in lines[name], lines[name]
        assert "copies   0" not in lines[name], lines[name]
    spilled = {name: int(line.split("spilled")[1].split()[0]) for name, line in lines.items()}
    assert all(spilled[name] <= 512 for name in spilled), spilled

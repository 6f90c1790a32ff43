"""The CPU's kernels beside what they stand for: products, rings in pages, draws."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="the compiled step needs numba")

from graphs.attention_cpu import CompiledAttention, CompiledCache
from graphs.compiled import as_array, matmul, pack
from graphs.compiled_attention import attend, store
from graphs.compiled_sampling import CompiledSampler, draw_rows
from graphs.kv_cache import KEY_BLOCK, Span
from graphs.sampling import HostSampler, SamplingRows, kth_largest, row_keys
from models.checkpoint_int8 import quantise_rows, widen_rows
from models.config import LMConfig

ROOT = Path(__file__).parents[3]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 40), (50, 33), (12, 7), (32, 2)])
def test_products_are_those_of_torch_and_a_row_has_its_bits_beside_any_others(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    random = np.random.default_rng(0)
    weight = torch.from_numpy(random.normal(size=(outputs, inputs)).astype(np.float32))
    # int8 gets a weight that it holds exactly, as a checkpoint does that ships as int8.
    weight = widen_rows(*quantise_rows(weight)) if dtype == torch.int8 else weight.to(dtype)
    packed = pack(weight, small=dtype == torch.int8)
    assert packed.itemsize == dtype.itemsize
    x = np.zeros((23, inputs + inputs % 2), np.float32)
    x[:, :inputs] = random.normal(size=(23, inputs))
    together = np.empty((23, outputs), np.float32)
    matmul(x, packed, together)
    expected = torch.from_numpy(x[:, :inputs]).double() @ weight.double().t()
    assert (torch.from_numpy(together) - expected).abs().max() < 1e-5 * inputs**0.5
    for rows in (1, 2, 3, 4, 7, 8, 15, 16):
        some = np.empty((rows, outputs), np.float32)
        matmul(np.ascontiguousarray(x[5 : 5 + rows]), packed, some)
        assert np.array_equal(some, together[5 : 5 + rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_in_pages_holds_the_bits_of_one_in_one_piece(dtype: torch.dtype) -> None:
    """The same keys, in blocks that lie anywhere: the table says where."""
    config = LMConfig(dim=96, num_heads=2, num_layers=1, context=300)
    heads, head_dim = config.num_heads, config.head_dim
    cache = CompiledCache(config, 1, 64, dtype=dtype)
    ring_blocks = cache.capacity // KEY_BLOCK
    pages = [3, 0, 5, 2, 6][:ring_blocks]
    dims = cache.keys.shape[-1]
    shape = (7, heads, KEY_BLOCK, dims)
    keys, values = as_array(torch.zeros(shape, dtype=dtype)), as_array(torch.zeros(shape, dtype=dtype))
    blocks = np.array([pages]) * heads * KEY_BLOCK * dims
    random = np.random.default_rng(0)
    for position in range(0, cache.capacity + 40, 20):  # past the ring's end
        rows = [random.normal(size=(20, heads, head_dim)).astype(np.float32) for _ in range(3)]
        q, k, v = (torch.from_numpy(row) for row in rows)
        whole = cache.attention([Span(0, 20, 0, position)])(0, q, k, v)
        plan = CompiledAttention(cache, [Span(0, 20, 0, position)])
        for memory, fresh in ((keys, rows[1]), (values, rows[2])):
            store(memory, blocks, KEY_BLOCK * dims, plan.slots, plan.places, fresh)
        paged = np.empty_like(rows[0])
        attend(rows[0], keys, values, blocks, KEY_BLOCK * dims, plan.slots, plan.first, plan.count, plan.scale, paged)
        assert np.array_equal(whole.numpy(), paged)


def _rows(count: int, top_k: int, temperature: float) -> SamplingRows:
    return SamplingRows(
        text_temperature=np.full(count, temperature, np.float32),
        text_top_k=np.full(count, top_k, np.int64),
        audio_temperature=np.full(count, temperature, np.float32),
        audio_top_k=np.full(count, top_k, np.int64),
        seed=np.arange(count, dtype=np.int64),
        column=np.arange(count, dtype=np.int64) * 7,
    )


@pytest.mark.parametrize("top_k", [1, 3, 25, 250, 2_000, 5_000])
def test_draws_are_those_of_numpy_whatever_the_top_k(top_k: int) -> None:
    rows = _rows(32, top_k, 0.8)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(32, 2_000)).astype(np.float32))
    assert torch.equal(CompiledSampler(rows).draw(logits, 3), HostSampler(rows).draw(logits, 3))


def test_all_that_tie_at_the_threshold_may_be_drawn() -> None:
    """Half of the logits are equal and the largest: a top-k of 2 keeps them all, and seeds spread over them."""
    logits = np.zeros((400, 64), np.float32)
    logits[:, ::2] = 1.0
    rows = _rows(400, 2, 1.0)
    drawn = CompiledSampler(rows).draw(torch.from_numpy(logits), 0).numpy()
    assert set(drawn.tolist()) == set(range(0, 64, 2))
    assert (kth_largest(logits, rows.text_top_k) == 1.0).all()


def test_given_tokens_stay_and_negative_logits_are_ordered() -> None:
    logits = -np.abs(np.random.default_rng(2).normal(size=(3, 50))).astype(np.float32) - 1
    rows = _rows(3, 1, 1.0)
    tokens = np.array([-2, 17, -2])
    draw_rows(logits, rows.text_temperature, rows.text_top_k, row_keys(rows), 0, tokens)
    assert tokens.tolist() == [int(logits[0].argmax()), 17, int(logits[2].argmax())]


def test_what_is_kept_on_disk_is_dropped_when_a_function_it_contains_changes(tmp_path: Path) -> None:
    """ELU contains `exp`, which is another file's: numba itself would not notice."""
    for package in ("graphs", "models"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import numpy as np; from graphs.compiled_codec_layers import elu; y = np.zeros(1, np.float32);"
        "elu(y, 0, -np.ones(1, np.float32), 0, 1); print(y[0])"
    )

    def elu_of_minus_one() -> float:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "kept")},
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    assert elu_of_minus_one() == pytest.approx(np.exp(-1.0) - 1.0)
    source = tmp_path / "graphs" / "compiled.py"
    changed = source.read_text().replace("y = y * part + np.float32(1.0)\n", "y = y * part + np.float32(3.0)\n")
    assert changed != source.read_text()
    source.write_text(changed)
    assert elu_of_minus_one() > 0.0


def test_kernels_that_are_kept_on_disk_are_loaded_without_the_compiler(tmp_path: Path) -> None:
    """What numba imports in order to compile, scipy among it, would be a quarter of a stage's start."""
    code = (
        "import sys, numpy as np; from graphs.compiled import add; x = np.ones((2, 3), np.float32); add(x, x.copy());"
        "assert (x == 2).all(); print('numba.np.linalg' in sys.modules, 'scipy.linalg' in sys.modules)"
    )

    def loaded() -> list[str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert loaded()[0] == "True"  # compiled, and kept
    assert loaded() == ["False", "False"]


def test_a_checkpoint_that_ships_as_int8_is_served_in_the_same_integers() -> None:
    """Widened to fp32 when loaded, quantised again when packed; by way of bf16 some would be one off."""
    shipped, scale = quantise_rows(torch.randn(2_000, 300, generator=torch.Generator().manual_seed(4)))
    again, scale_again = quantise_rows(widen_rows(shipped, scale))
    assert torch.equal(again, shipped)
    torch.testing.assert_close(scale_again, scale, rtol=1e-6, atol=0)
    rounded, _ = quantise_rows(widen_rows(shipped, scale).bfloat16())
    off = (rounded.int() - shipped.int()).abs()
    assert 0 < off.float().mean() < 0.1
    assert off.max() == 1

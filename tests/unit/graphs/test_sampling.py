"""Sampling draws from the right distribution, and from nothing but seed, column, stream and token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.compiled_sampling import CompiledSampler
from graphs.sampling import DeviceSampler, HostSampler, SamplingRows

CPU = torch.device("cpu")


def rows_of(
    rows: int, *, temperature: float = 1.0, top_k: int = 512, seed: int = 7, columns: range | None = None
) -> SamplingRows:
    column = np.array(columns if columns is not None else range(rows), dtype=np.int64)
    temperatures, top_ks = np.full(rows, temperature, dtype=np.float32), np.full(rows, top_k, dtype=np.int64)
    return SamplingRows(temperatures, top_ks, temperatures, top_ks, np.full(rows, seed, dtype=np.int64), column)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampler", [HostSampler, CompiledSampler])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(temperature: float, sampler: type[HostSampler]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])
    rows = 60_000
    tokens = sampler(rows_of(rows, temperature=temperature)).draw(logits.expand(rows, -1).contiguous(), 3)
    counts = torch.bincount(tokens, minlength=6).double()
    expected = (logits / temperature).softmax(-1).double() * rows
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5  # 0.1 % of correct samplers exceed this at 5 degrees of freedom; the seed is fixed


def test_top_k_never_draws_beyond_k() -> None:
    logits = normal(1, 100)
    tokens = HostSampler(rows_of(5_000, temperature=5.0, top_k=7)).draw(logits.expand(5_000, -1).contiguous(), 0)
    assert set(tokens.tolist()) == set(logits[0].topk(7).indices.tolist())


def test_ties_at_the_last_place_are_all_in() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).expand(4_000, -1).contiguous()
    rows = rows_of(4_000, top_k=2)
    for sampler in (HostSampler(rows), CompiledSampler(rows), DeviceSampler(rows, CPU)):
        assert set(sampler.draw(logits, 0).tolist()) == {0, 1, 2, 3}


def test_temperature_zero_is_greedy_beside_rows_that_draw() -> None:
    logits = normal(64, 100, seed=2)
    rows = rows_of(64)
    rows.audio_temperature[::2] = 0.0
    for sampler in (HostSampler(rows), CompiledSampler(rows), DeviceSampler(rows, CPU)):
        tokens = sampler.draw(logits, 4)
        assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
        assert not torch.equal(tokens[1::2], logits.argmax(-1)[1::2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_row_does_not_know_its_neighbours(seed: int, column: int, others: int, noise: int) -> None:
    dice = np.random.default_rng(noise)
    logits = normal(others + 1, 2048, seed=noise)

    def crowd(rows: int) -> SamplingRows:
        """Random company; the last row is always the same one."""
        temperature = dice.random(rows, dtype=np.float32)
        top_k = dice.integers(1, 512, rows)
        seeds, columns = dice.integers(0, 2**62, rows), dice.integers(0, 10**6, rows)
        temperature[-1], top_k[-1], seeds[-1], columns[-1] = 0.8, 250, seed, column
        return SamplingRows(temperature, top_k, temperature, top_k, seeds, columns)

    alone = HostSampler(crowd(1)).draw(logits[-1:], 1)[0]
    assert HostSampler(crowd(others + 1)).draw(logits, 1)[-1] == alone
    assert CompiledSampler(crowd(others + 1)).draw(logits, 1)[-1] == alone
    assert DeviceSampler(crowd(others + 1), CPU).draw(logits, 1)[-1] == alone


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 8))
def test_noise_is_finite_and_the_same_on_host_and_device(seed: int, column: int, stream: int) -> None:
    rows = rows_of(1, seed=seed, columns=range(column, column + 1))
    noise = HostSampler(rows).noise(stream, 32_000)
    assert np.isfinite(noise).all()
    np.testing.assert_allclose(noise, DeviceSampler(rows, CPU).noise(stream, 32_000).numpy(), rtol=1e-4, atol=1e-5)


def test_seeds_columns_and_streams_all_matter() -> None:
    noises = [
        HostSampler(rows_of(1, seed=seed, columns=range(column, column + 1))).noise(stream, 64)
        for seed, column, stream in ((1, 1, 0), (2, 1, 0), (1, 2, 0), (1, 1, 1))
    ]
    for i, left in enumerate(noises):
        for right in noises[i + 1 :]:
            assert not np.isclose(left, right).any()

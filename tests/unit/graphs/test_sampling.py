"""Sampling draws from the right distribution, and from nothing but seed, column, stream and token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs.sampling import gumbel, sample


def draw(logits: Tensor, *, temperature: float = 1.0, top_k: int = 512, seed: int = 7, column: int = 0) -> Tensor:
    rows = logits.shape[0]
    return sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), seed),
        torch.arange(column, column + rows),
        3,
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])
    rows = 60_000
    tokens = draw(logits.expand(rows, -1), temperature=temperature)
    counts = torch.bincount(tokens, minlength=6).double()
    expected = (logits / temperature).softmax(-1).double() * rows
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 20.5  # 0.1 % of correct samplers exceed this at 5 degrees of freedom; the seed is fixed


def test_top_k_never_draws_beyond_k() -> None:
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(1)).expand(5_000, -1)
    allowed = set(logits[0].topk(7).indices.tolist())
    assert set(draw(logits, temperature=5.0, top_k=7).tolist()) == allowed


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(2))
    assert torch.equal(draw(logits, temperature=0.0), logits.argmax(-1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_row_does_not_know_its_neighbours(seed: int, column: int, rows: int, noise: int) -> None:
    generator = torch.Generator().manual_seed(noise)
    mine = torch.randn(1, 2048, generator=generator)
    others = torch.randn(rows, 2048, generator=generator)
    alone = sample(mine, torch.tensor([0.8]), torch.tensor([250]), torch.tensor([seed]), torch.tensor([column]), 1)
    crowd = sample(
        torch.cat((others, mine)),
        torch.cat((torch.rand(rows, generator=generator), torch.tensor([0.8]))),
        torch.cat((torch.randint(1, 512, (rows,), generator=generator), torch.tensor([250]))),
        torch.cat((torch.randint(0, 2**62, (rows,), generator=generator), torch.tensor([seed]))),
        torch.cat((torch.randint(0, 10**6, (rows,), generator=generator), torch.tensor([column]))),
        1,
    )
    assert crowd[-1] == alone[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(0, 8))
def test_noise_is_finite(seed: int, column: int, stream: int) -> None:
    noise = gumbel(torch.tensor([seed]), torch.tensor([column]), stream, torch.arange(32_000).unsqueeze(0))
    assert torch.isfinite(noise).all()


def test_seeds_columns_and_streams_all_matter() -> None:
    tokens = torch.arange(64).unsqueeze(0)
    one, two = torch.tensor([1]), torch.tensor([2])
    noises = [
        gumbel(one, one, 0, tokens),
        gumbel(two, one, 0, tokens),
        gumbel(one, two, 0, tokens),
        gumbel(one, one, 1, tokens),
    ]
    for i, left in enumerate(noises):
        for right in noises[i + 1 :]:
            assert not torch.isclose(left, right).any()

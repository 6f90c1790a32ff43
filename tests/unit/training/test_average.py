"""The average of weights: its value, its way through a resume state, and the module it lends itself to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.average import Average, averaged, newest


@pytest.fixture(name="module")
def _module() -> nn.Module:
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    module.bias.requires_grad_(False)
    return module


def walk(module: nn.Module, average: Average, values: list[float]) -> None:
    for value in values:
        nn.init.constant_(module.weight, value)  # type: ignore[arg-type]
        average.update()


def mean(average: Average) -> float:
    return float(average.state()["average.weight"])


def test_of_a_few_steps_is_their_mean(module: nn.Module) -> None:
    average = Average(module)
    walk(module, average, [1.0, 2.0, 6.0])
    assert mean(average) == pytest.approx(3.0)
    assert set(average.state()) == {"average.weight"}  # the bias does not learn


def test_of_many_forgets_the_first(module: nn.Module) -> None:
    average = Average(module)
    walk(module, average, [100.0] * 500 + [0.0] * 500)
    assert mean(average) == pytest.approx(100.0 * (1 - 1 / 500) ** 500, rel=1e-3)


def test_goes_on_from_a_state(module: nn.Module) -> None:
    whole = Average(module)
    walk(module, whole, [1.0, 2.0, 3.0, 4.0])
    first = Average(module)
    walk(module, first, [1.0, 2.0])
    second = Average(module)
    second.load(first.state(), 2)
    walk(module, second, [3.0, 4.0])
    assert mean(second) == pytest.approx(mean(whole))


def test_lends_itself_and_gives_back(module: nn.Module) -> None:
    average = Average(module)
    walk(module, average, [1.0, 2.0, 6.0])
    with average:
        assert float(next(module.parameters()).detach()) == pytest.approx(3.0)
    assert float(next(module.parameters()).detach()) == 6.0
    assert mean(average) == pytest.approx(3.0)


def test_a_state_has_both() -> None:
    state = {"weight": torch.tensor(6.0), "bias": torch.tensor(1.0), "average.weight": torch.tensor(3.0)}
    assert {name: float(t) for name, t in averaged(state).items()} == {"weight": 3.0, "bias": 1.0}
    assert {name: float(t) for name, t in newest(state).items()} == {"weight": 6.0, "bias": 1.0}

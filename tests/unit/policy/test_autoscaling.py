"""Autoscaling: up at once, down after a quiet period, never out of bounds, no flapping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.autoscaling import AutoscalingConfig, Load, decide

CONFIG = AutoscalingConfig(slots_per_replica=4, min_replicas=1, max_replicas=5, shrink_after_s=60.0)


def steady(busy: int, replicas: int, until_s: float = 100.0, waiting: int = 0) -> list[Load]:
    return [Load(float(t), busy, waiting, replicas) for t in range(0, int(until_s) + 1, 5)]


def test_no_history_is_the_minimum() -> None:
    assert decide(0.0, [], CONFIG) == 1


def test_the_last_free_slot_taken_brings_the_next_replica_at_once() -> None:
    assert decide(0.0, [Load(0.0, 3, 0, 1)], CONFIG) == 1
    assert decide(0.0, [Load(0.0, 4, 0, 1)], CONFIG) == 2


def test_callers_who_wait_count() -> None:
    assert decide(0.0, [Load(0.0, 4, 9, 1)], CONFIG) == 4


def test_never_beyond_the_maximum() -> None:
    assert decide(0.0, [Load(0.0, 400, 0, 1)], CONFIG) == 5


def test_quiet_for_long_enough_gives_replicas_back() -> None:
    assert decide(100.0, steady(0, 3), CONFIG) == 1


def test_a_busy_moment_within_the_quiet_period_keeps_them() -> None:
    history = steady(0, 3)
    history[-3] = Load(history[-3].at_s, 8, 0, 3)
    assert decide(100.0, history, CONFIG) == 3


def test_not_watched_for_long_enough_keeps_them() -> None:
    assert decide(30.0, steady(0, 3, until_s=30.0), CONFIG) == 3


def test_hysteresis_keeps_a_replica_that_one_more_caller_would_bring_back() -> None:
    # 3 busy + 1 spare fit one replica of 4 slots exactly: growing would stop at 1, shrinking wants air.
    assert decide(0.0, [Load(0.0, 3, 0, 1)], CONFIG) == 1
    assert decide(100.0, steady(3, 2), CONFIG) == 2
    assert decide(100.0, steady(2, 2), CONFIG) == 1


def test_scale_to_zero_when_asked_for() -> None:
    config = AutoscalingConfig(slots_per_replica=4, min_replicas=0, max_replicas=5, shrink_after_s=60.0)
    assert decide(100.0, steady(0, 1), config) == 0
    assert decide(0.0, [Load(0.0, 0, 1, 0)], config) == 1


def test_the_reserve_is_room_that_callers_do_not_get_as_long_as_anybody_talks() -> None:
    config = AutoscalingConfig(4, min_replicas=1, max_replicas=5, reserve_slots=4, shrink_after_s=60.0)
    assert decide(0.0, [Load(0.0, 0, 0, 1)], config) == 1
    assert decide(0.0, [Load(0.0, 1, 0, 1)], config) == 2
    assert decide(0.0, [Load(0.0, 3, 0, 2)], config) == 2
    assert decide(0.0, [Load(0.0, 4, 0, 2)], config) == 3
    assert decide(100.0, steady(2, 4), config) == 2  # the reserve is whole replicas: the air of hysteresis is not on it
    assert decide(100.0, steady(0, 2), config) == 1


@pytest.mark.parametrize(
    "wrong", [{"slots_per_replica": 0}, {"min_replicas": 3, "max_replicas": 2}, {"shrink_fill": 0.0}]
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoscalingConfig(**{"slots_per_replica": 4, **wrong})  # type: ignore[arg-type] # wrong on purpose


LOADS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), min_size=1, max_size=40)


@given(LOADS, st.integers(1, 5))
def test_always_within_bounds_and_never_too_few_for_the_load(loads: list[tuple[int, int]], replicas: int) -> None:
    history = [Load(5.0 * i, busy, waiting, replicas) for i, (busy, waiting) in enumerate(loads)]
    wanted = decide(history[-1].at_s, history, CONFIG)
    assert CONFIG.min_replicas <= wanted <= CONFIG.max_replicas
    conversations = sum(loads[-1])
    assert wanted * CONFIG.slots_per_replica >= min(conversations + 1, CONFIG.max_replicas * CONFIG.slots_per_replica)


@given(st.integers(0, 25), st.integers(1, 5))
def test_a_steady_load_settles_on_one_answer(busy: int, replicas: int) -> None:
    for _ in range(6):
        replicas = decide(1000.0, steady(busy, replicas, 1000.0), CONFIG)
    assert decide(1000.0, steady(busy, replicas, 1000.0), CONFIG) == replicas

"""The policy as Serve drives it: ten times a second, with each replica's last words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from serving.autoscaling import ConversationPolicy


class Point(NamedTuple):
    timestamp: float
    value: float


@dataclass
class Context:
    """The part of Serve's AutoscalingContext that the policy reads."""

    current_time: float | None
    target_num_replicas: int
    raw_metrics: dict[str, dict[str, list[Point]]] | None = field(default_factory=dict)


def context(at_s: float, replicas: int, *busy: int, waiting: int = 0) -> Context:
    """Each replica says what it has now, and said 99 a moment ago."""
    stale = Point(at_s - 1, 99.0)
    return Context(
        at_s,
        replicas,
        {
            "busy": {f"r{i}": [stale, Point(at_s, float(b))] for i, b in enumerate(busy)},
            "waiting": {f"r{i}": [stale, Point(at_s, float(waiting))] for i in range(len(busy))},
        },
    )


def policy(shrink_after_s: float = 10.0) -> ConversationPolicy:
    return ConversationPolicy(4, 1, 3, spare_slots=1, reserve_slots=0, shrink_after_s=shrink_after_s)


def test_the_sum_of_busy_slots_and_the_one_queue_decide() -> None:
    assert policy()(context(0.0, 1, 3))[0] == 1
    assert policy()(context(0.0, 1, 4))[0] == 2
    assert policy()(context(0.0, 2, 4, 3, waiting=2))[0] == 3


def test_before_any_replica_has_spoken_nothing_changes() -> None:
    assert policy()(Context(0.0, 1, None))[0] == 1
    assert policy()(Context(0.0, 1, {"busy": {"r0": []}}))[0] == 1


def test_it_shrinks_after_the_quiet_period_however_often_it_is_asked() -> None:
    it = policy(shrink_after_s=10.0)
    wanted = [it(context(tick / 10, 3, 0, 0, 0))[0] for tick in range(130)]
    assert set(wanted[:100]) == {3}
    assert wanted[-1] == 1


def test_what_it_remembers_is_bounded() -> None:
    it = policy(shrink_after_s=10.0)
    for tick in range(5000):
        it(context(tick / 10, 3, tick % 2))
    assert len(it._history) <= 102

"""How many replicas the load asks for: up at once, down only after a quiet period."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """What the cluster carried at one moment. `at_s` is on the clock that `decide` is called with."""

    at_s: float
    busy: int  # slots in use
    waiting: int  # callers in the queue
    replicas: int  # running, or asked for and not here yet


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    """`spare_slots` are kept free, so that the next caller finds one while a replica starts (about 10 s where a node is
    at hand, minutes where it is not). `reserve_slots` come on top while anybody talks: they are what a dead replica's
    conversations move into, and new callers do not get them. `shrink_fill` is the hysteresis: a replica is given back
    only if the rest would then be filled to less than this share, so that one more caller does not bring it back."""

    slots_per_replica: int
    min_replicas: int = 1
    max_replicas: int = 1
    spare_slots: int = 1
    reserve_slots: int = 0
    shrink_after_s: float = 120.0
    shrink_fill: float = 0.8

    def __post_init__(self) -> None:
        if self.slots_per_replica < 1:
            raise ValueError(f"slots_per_replica must be at least 1, not {self.slots_per_replica}")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"want 0 <= min_replicas <= max_replicas, not {self.min_replicas}, {self.max_replicas}")
        if not 0.0 < self.shrink_fill <= 1.0:
            raise ValueError(f"shrink_fill must be in (0, 1], not {self.shrink_fill}")


def decide(now_s: float, history: Sequence[Load], config: AutoscalingConfig) -> int:
    """The number of replicas to have from now on.

    `history` is in order of time, its last entry is the present; entries older than `shrink_after_s` matter
    only as proof that the quiet period has been watched in full. With no history the answer is `min_replicas`.
    """
    if not history:
        return config.min_replicas
    current = history[-1]
    grow_to = _replicas_for(current, config.slots_per_replica, config)
    if grow_to >= current.replicas:
        return _clamp(grow_to, config)

    quiet_since_s = now_s - config.shrink_after_s
    if history[0].at_s > quiet_since_s:
        return _clamp(current.replicas, config)  # not watched for long enough to know that it is quiet
    comfortable = config.slots_per_replica * config.shrink_fill
    shrink_to = max(_replicas_for(load, comfortable, config) for load in history if load.at_s >= quiet_since_s)
    return _clamp(min(current.replicas, shrink_to), config)


def _replicas_for(load: Load, slots: float, config: AutoscalingConfig) -> int:
    conversations = load.busy + load.waiting
    if conversations == 0 and config.min_replicas == 0:
        return 0  # scale to zero means zero: spare slots are for a system that is in use
    reserve = config.reserve_slots if conversations else 0
    wanted = (conversations + config.spare_slots) / slots + reserve / config.slots_per_replica
    return math.ceil(wanted - 1e-9)  # 4 / 3.2 + 3 / 4 is 2, whatever floats make of it


def _clamp(replicas: int, config: AutoscalingConfig) -> int:
    return max(config.min_replicas, min(config.max_replicas, replicas))

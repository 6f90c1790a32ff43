"""cluster.policy.autoscaling as a Serve policy: replicas tell their busy slots, Serve asks how many are wanted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cluster.policy.autoscaling import AutoscalingConfig, Load, decide

SAMPLE_EVERY_S = 1.0  # Serve's loop asks ten times a second; a quiet minute need not be 600 entries


class Context(Protocol):
    """The part of ray.serve's AutoscalingContext that is read here."""

    @property
    def current_time(self) -> float | None: ...

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Sequence[Any]]] | None: ...


class ConversationPolicy:
    """Serve makes one of these in its controller (`policy_function` by import path, `policy_kwargs` as below)."""

    def __init__(
        self,
        slots_per_replica: int,
        min_replicas: int,
        max_replicas: int,
        spare_slots: int,
        reserve_slots: int,
        shrink_after_s: float,
    ) -> None:
        self._config = AutoscalingConfig(
            slots_per_replica, min_replicas, max_replicas, spare_slots, reserve_slots, shrink_after_s
        )
        self._history: deque[Load] = deque()

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The wanted number of replicas, and no state of Serve's keeping."""
        now_s = context.current_time or 0.0
        load = Load(
            now_s,
            busy=int(sum(_latest(context, "busy"))),
            # Every replica has heard the router's one number; the highest is the newest or errs on the safe side.
            waiting=int(max(_latest(context, "waiting"), default=0)),
            replicas=context.target_num_replicas,
        )
        self._remember(load)
        return decide(now_s, self._history, self._config), {}

    def _remember(self, load: Load) -> None:
        last = self._history[-1] if self._history else None
        if last is None or _differs(last, load) or load.at_s - last.at_s >= SAMPLE_EVERY_S:
            self._history.append(load)
        # The oldest entry proves that the whole quiet period was watched, so one from before it has to stay.
        quiet_since_s = load.at_s - self._config.shrink_after_s
        while len(self._history) > 1 and self._history[1].at_s <= quiet_since_s:
            self._history.popleft()


def _differs(a: Load, b: Load) -> bool:
    return (a.busy, a.waiting, a.replicas) != (b.busy, b.waiting, b.replicas)


def _latest(context: Context, name: str) -> list[float]:
    """The last value of each replica. Serve's own aggregate is a mean over 30 s, which would be half a minute late."""
    series = (context.raw_metrics or {}).get(name, {})
    return [float(points[-1].value) for points in series.values() if points]

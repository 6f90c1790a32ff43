"""Whether a caller is let in, waits, or is turned away, and whose turn it is; decided before a slot is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum


class Admission(Enum):
    """What becomes of a caller."""

    ADMIT = "admit"
    WAIT = "wait"
    TENANT_LIMIT = "tenant_limit"
    NO_CAPACITY = "no_capacity"


def admit(
    *,
    tenant_busy: int,
    tenant_limit: int | None,
    room: bool,
    waiting: int,
    max_waiting: int,
    wait_s: float,
) -> Admission:
    """Decide for one caller.

    `tenant_busy` counts the tenant's conversations and its callers in the queue: otherwise a tenant at its
    limit could fill the queue and keep everybody else out. Who comes while others wait goes behind them, even
    when a slot is free at this very moment: it is theirs.
    """
    if tenant_limit is not None and tenant_busy >= tenant_limit:
        return Admission.TENANT_LIMIT
    if room and waiting == 0:
        return Admission.ADMIT
    if wait_s > 0 and waiting < max_waiting:
        return Admission.WAIT
    return Admission.NO_CAPACITY


def next_tenant(waiting: Iterable[str], held_by: Callable[[str], int]) -> str:
    """Which of the tenants that have callers in the queue gets the next slot: the one that has the fewest, so that when
    there is too little for all, each gets an equal share of it (max-min fairness). Ties go to whoever comes first in
    `waiting`, that is, has waited longest."""
    return min(waiting, key=held_by)

"""Admission: tenants' limits first, then room, then the queue."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.policy.admission import Admission, admit, next_tenant

FREE: dict[str, Any] = {
    "tenant_busy": 0,
    "tenant_limit": None,
    "room": True,
    "waiting": 0,
    "max_waiting": 2,
    "wait_s": 1.0,
}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, Admission.ADMIT),
        ({"room": False}, Admission.WAIT),
        ({"room": False, "wait_s": 0.0}, Admission.NO_CAPACITY),
        ({"room": False, "waiting": 2}, Admission.NO_CAPACITY),
        # A free slot belongs to whoever came first.
        ({"room": True, "waiting": 1}, Admission.WAIT),
        ({"room": True, "waiting": 1, "wait_s": 0.0}, Admission.NO_CAPACITY),
        # The limit is checked before anything is taken, room or not.
        ({"tenant_busy": 3, "tenant_limit": 3}, Admission.TENANT_LIMIT),
        ({"tenant_busy": 3, "tenant_limit": 3, "room": False}, Admission.TENANT_LIMIT),
        ({"tenant_busy": 2, "tenant_limit": 3}, Admission.ADMIT),
    ],
)
def test_verdicts(changes: dict[str, Any], verdict: Admission) -> None:
    assert admit(**{**FREE, **changes}) is verdict


def test_the_tenant_with_the_fewest_conversations_is_next_and_among_equals_who_waited_longest() -> None:
    held = {"big": 5, "small": 1, "tiny": 1}
    assert next_tenant(["big", "tiny", "small"], held.__getitem__) == "tiny"
    assert next_tenant(["big"], held.__getitem__) == "big"

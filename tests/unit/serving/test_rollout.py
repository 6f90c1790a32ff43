"""When a deploy is over: not before every conversation has moved, and not only when the last socket has closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve._private.common import ReplicaState

from serving.rollout import progress, replicas_of

FORMER = {"Ingress": {"i1": "RUNNING"}, "PersonaPlexReplica": {"r1": "RUNNING", "r2": "RUNNING"}}


def application(replicas: Mapping[str, Mapping[str, str]], status: str = "DEPLOYING") -> dict[str, Any]:
    """As Serve shows it, as far as anybody reads it here."""
    return {
        "status": status,
        "message": "no accelerator" if status == "DEPLOY_FAILED" else "",
        "deployments": {
            name: {
                "target_num_replicas": len(FORMER[name]),
                "replicas": [{"replica_id": each, "state": ReplicaState(state)} for each, state in states.items()],
            }
            for name, states in replicas.items()
        },
    }


def seen(ingress: Mapping[str, str], replica: Mapping[str, str]) -> tuple[bool, bool, str]:
    """Whether it serves, whether it is over, and what is said."""
    now = progress(
        application({"Ingress": ingress, "PersonaPlexReplica": replica}), replicas_of(application(FORMER, "RUNNING"))
    )
    return now.serves, now.over, str(now)


def test_what_runs_is_not_what_is_being_deployed() -> None:
    assert seen(FORMER["Ingress"], FORMER["PersonaPlexReplica"]) == (
        False,
        False,
        "0 of 2 replicas are new, 2 old to be stopped; 0 of 1 ingresses are new, 1 old to be stopped",
    )


def test_conversations_that_have_not_moved_are_waited_for() -> None:
    serves, over, told = seen({"i2": "RUNNING"}, {"r3": "RUNNING", "r4": "RUNNING", "r2": "STOPPING"})
    assert not serves
    assert not over
    assert "2 of 2 replicas are new, 1 old with calls to let go of" in told


def test_a_new_replica_that_has_not_started_is_waited_for() -> None:
    assert not seen({"i2": "RUNNING"}, {"r3": "RUNNING", "r4": "STARTING"})[0]


def test_a_former_ingress_that_carries_calls_holds_nobody_up_and_is_said() -> None:
    serves, over, told = seen({"i1": "STOPPING", "i2": "RUNNING"}, {"r3": "RUNNING", "r4": "RUNNING"})
    assert serves
    assert not over
    assert told.endswith("1 of 1 ingresses are new, 1 old with calls to let go of")


def test_when_nothing_old_is_left_it_is_over() -> None:
    assert seen({"i2": "RUNNING"}, {"r3": "RUNNING", "r4": "RUNNING"})[:2] == (True, True)


def test_the_first_deploy_begins_with_nothing() -> None:
    assert not progress({}, frozenset()).serves
    fresh = progress(application(FORMER), frozenset())
    assert fresh.over


def test_what_serve_gives_up_is_said() -> None:
    assert progress(application(FORMER, "DEPLOY_FAILED"), frozenset()).failure == "no accelerator"
    assert not progress(application(FORMER), frozenset()).failure

"""What Serve is told about ingress and replica: how they are replaced, and how long they may take to leave."""

from __future__ import annotations

from typing import Any

import pytest

from serving.app import build_app
from serving.settings import ServeSettings


def deployments(**settings: Any) -> tuple[Any, Any]:
    """(ingress, replica)"""
    ingress = build_app(ServeSettings(device="cpu", **settings))._bound_deployment  # type: ignore[attr-defined] # Ray
    return ingress, ingress.init_args[1]._bound_deployment


@pytest.mark.parametrize("replicas", [1, 3, 50])
def test_a_deploy_replaces_one_replica_at_a_time(replicas: int) -> None:
    _, replica = deployments(min_replicas=replicas, max_replicas=replicas)
    config = replica._deployment_config
    assert max(int(config.rolling_update_percentage * replicas), 1) == 1  # as Serve counts
    assert config.max_surge_percent == 0


@pytest.mark.parametrize("replicas", [1, 3, 7])
def test_as_many_new_ones_start_first_as_was_asked_for(replicas: int) -> None:
    _, replica = deployments(min_replicas=replicas, max_replicas=replicas, surge_replicas=1)
    percent = replica._deployment_config.max_surge_percent
    assert (percent * replicas + 99) // 100 in (1, 2)  # as Serve counts, rounding up


@pytest.mark.parametrize("ingresses", [1, 3, 7])
def test_an_ingress_starts_before_it_replaces_one_and_waits_for_none_that_leaves(ingresses: int) -> None:
    """Without a surge Serve stops none while as many as it wants are leaving, with calls that may last for minutes."""
    ingress, _ = deployments(ingresses=ingresses)
    percent = ingress._deployment_config.max_surge_percent
    assert (percent * ingresses + 99) // 100 in (1, 2)  # as Serve counts, rounding up


def test_nobody_is_hurried_out() -> None:
    ingress, replica = deployments(drain_s=600.0, ingress_drain_s=60.0)
    assert replica._deployment_config.graceful_shutdown_timeout_s > 600.0
    assert ingress._deployment_config.graceful_shutdown_timeout_s == 60.0

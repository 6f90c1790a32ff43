"""Where the router lives: on the head, and never on a node that comes and goes with its replicas."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from serving.router_actor import NAME, NAMESPACE, replace_router
from serving.routing import RouterConfig


@pytest.fixture
def head() -> Iterator[str]:
    """The head's id, in a cluster where most nodes are others."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield str(cluster.head_node.node_id)
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_however_often_it_is_started_it_is_on_the_head(head: str) -> None:
    where = []
    for _ in range(4):  # by chance all four would be there once in 81 times
        replace_router(RouterConfig())
        router: Any = ray.get_actor(NAME, NAMESPACE)
        where.append(actors(router._actor_id.hex())["Address"]["NodeID"])
    assert where == [head] * 4

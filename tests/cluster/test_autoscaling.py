"""On a cluster of fake H100 nodes: calls beyond one replica's slots bring the second replica and are admitted."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster

from cluster.ports import free_port
from serving.app import build_app
from serving.guard import guard_environment
from serving.local import deploy
from serving.router_client import RouterClient
from serving.routing import RouterConfig
from serving.settings import ServeSettings
from tests.polling import until
from tests.real_server import call

SHRINK_AFTER_S = 5.0


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    """One slot a replica, so that the second caller is one too many. The stages run on the CPU, and still ask for
    the accelerator: what Ray places is what it would place with real ones."""
    return ServeSettings(
        port=free_port(),
        slots=1,
        device="cpu",
        accelerator="H100",
        min_replicas=1,
        max_replicas=2,
        spare_slots=0,
        reserve_slots=0,
        shrink_after_s=SHRINK_AFTER_S,
        admission_wait_s=90.0,
        ready_timeout_s=90.0,
        idle_timeout_s=300.0,
        trunk_dead_s=10.0,
        lease_s=10.0,
        trunk_host="127.0.0.1",
        proxy="python",
    )


@pytest.fixture(scope="module")
def cluster(settings: ServeSettings) -> Iterator[str]:
    """A head that has no accelerator, two workers with one each, and the application on them; its URL."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in guard_environment(1e6, 10.0).items():
            patch.setenv(name, value)
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_SERVE_LOG_TO_STDERR", "0")
        app = build_app(settings)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=2, resources={"H100": 1})
            ray.init(address=nodes.address, log_to_driver=False, configure_logging=False)
            deploy(app, settings)
            yield f"http://127.0.0.1:{settings.port}"
        finally:
            ray_serve.shutdown()
            ray.shutdown()
            nodes.shutdown()


async def seconds_until(router: RouterClient, replicas: int, within_s: float) -> float:
    """Seconds until so many replicas report."""

    async def there() -> bool:
        return (await router.status()).replicas == replicas

    start_s = time.monotonic()
    await until(there, within_s)
    return time.monotonic() - start_s


async def test_a_caller_too_many_brings_the_second_replica_and_is_admitted(
    cluster: str, settings: ServeSettings
) -> None:
    router = RouterClient(RouterConfig(settings.lease_s, settings.max_waiting))
    await seconds_until(router, 1, within_s=60)
    async with call(cluster, seed=1) as first:
        await first.ready()
        assert (await router.status()).replicas == 1
        async with call(cluster, seed=2) as second:
            start_s = time.monotonic()
            await second.ready(within_s=120)
            print(f"the second caller was ready after {time.monotonic() - start_s:.1f} s")
            status = await router.status()
            assert (status.replicas, status.busy, status.waiting) == (2, 2, 0)
            await first.speak(12)  # the first never noticed
            await second.speak(12)
            used = [node for node in ray.nodes() if node["Alive"] and "H100" in node["Resources"]]
            assert len(used) == 2
            assert ray.available_resources().get("H100", 0) == 0  # each replica holds one
    # Nobody calls any more: one is given back.
    print(f"one replica again after {await seconds_until(router, 1, within_s=SHRINK_AFTER_S + 60):.1f} s")

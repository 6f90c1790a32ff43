"""The Ray Serve application: `Ingress`, who is talked to, and `PersonaPlexReplica`, one GPU's worth of slots."""

from __future__ import annotations

import math
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serving.ingress import Ingress
from serving.plan import PROCESS_CPUS, Plan, make_plan
from serving.replica_deployment import PersonaPlexReplica
from serving.settings import ServeSettings
from serving.tenants import Tenants

APP_NAME = "personaplex"
ONE_AT_A_TIME = 0.001  # of the replicas; Serve rounds up to one
MANY = 10_000  # each open WebSocket is an ongoing request to Serve; admission is ours, in the router


def build_app(settings: ServeSettings) -> Application:
    """The application, to be given to `serve.run`. Reads the checkpoint's names and the keys file, so that a
    mistake in either is seen here and not in a worker's log.

    Raises models.checkpoint.CheckpointError and serving.tenants.KeysFileError.
    """
    plan = make_plan(settings)
    Tenants.load(settings.keys_file)
    common: dict[str, Any] = {
        "max_ongoing_requests": MANY,
        "ray_actor_options": {"num_cpus": PROCESS_CPUS},
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    replica = serve.deployment(
        **common,
        **_scale(plan),
        placement_group_bundles=[plan.bundle()],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=settings.drain_s + 10.0,
        # A new build replaces one replica at a time: the reserve has room for the conversations of one.
        rolling_update_percentage=ONE_AT_A_TIME,
        max_surge_percent=math.ceil(100 * settings.surge_replicas / settings.min_replicas),
    )(PersonaPlexReplica)
    # Sockets cannot move: an ingress that is replaced takes no new ones and keeps its own for a while. Its successor
    # starts before it and lives beside it, and so may the next deploy's; Serve spreads them where it can. Without a
    # surge Serve would replace none as long as more of them are leaving than it may miss: a second deploy would wait
    # for the last call on the first one's ingresses.
    ingress = serve.deployment(
        **common,
        num_replicas=settings.ingresses,
        max_surge_percent=math.ceil(100 / settings.ingresses),
        max_replicas_per_node=4,
        graceful_shutdown_timeout_s=settings.ingress_drain_s,
    )(Ingress)
    app: Application = ingress.bind(plan, replica.bind(plan))
    return app


def _scale(plan: Plan) -> dict[str, Any]:
    settings = plan.settings
    if settings.max_replicas == settings.min_replicas:
        return {"num_replicas": settings.min_replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call] # Ray
        policy_function="serving.autoscaling:ConversationPolicy",
        policy_kwargs={
            "slots_per_replica": plan.slots,
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "spare_slots": settings.spare_slots,
            "reserve_slots": plan.reserve_slots,
            "shrink_after_s": settings.shrink_after_s,
        },
    )
    # The policy itself knows when to wait; Serve's own delays would come on top.
    config = AutoscalingConfig(
        min_replicas=settings.min_replicas,
        max_replicas=settings.max_replicas,
        initial_replicas=settings.min_replicas,
        metrics_interval_s=1.0,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=policy,
    )
    return {"autoscaling_config": config}

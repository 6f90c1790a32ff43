"""The Ray Serve application: `Ingress` (who is talked to) and `PersonaPlexReplica` (one GPU's worth of slots)."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from actors.interfaces import ReplicaSettings
from actors.replica import Replica
from actors.stage_build import StageConfig
from actors.stages_actor import ActorOptions, StageActors
from serving.api import IngressParts, build_api
from serving.catalog import Catalog
from serving.ingress_chat import ChatEndpoint, ServedModel
from serving.pieces import load_pieces
from serving.replica_host import HostConfig, ReplicaHost
from serving.router import RouterConfig
from serving.router_actor import RouterClient
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.telemetry import Telemetry
from serving.tenants import Tenants
from serving.trunk_client import TrunkPool
from serving.trunk_server import TrunkConfig

log = logging.getLogger(__name__)

APP_NAME = "personaplex"
# Ray refuses to place what asks for nothing; these small shares let eight processes of a laptop's two cores start.
PROCESS_CPUS = 0.1
STAGES = 3
ENGINE_GPU_SHARE, CODEC_GPU_SHARE = 0.6, 0.2
HANG_UP_S = 3.0
MANY = 10_000  # each open WebSocket is an ongoing request to Serve; admission is ours, in the router


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings with everything decided that depends on where the application is built."""

    settings: ServeSettings
    catalog: Catalog
    device: str  # "cpu" or "cuda"
    accelerator: str | None
    trunk: TrunkConfig

    @property
    def router(self) -> RouterConfig:
        return RouterConfig(self.settings.lease_s, self.settings.max_waiting)

    def stage(self, threads: int) -> StageConfig:
        dtype = None if self.settings.dtype == "auto" else self.settings.dtype
        return StageConfig(self.settings.checkpoint, self.settings.slots, self.device, dtype, threads)

    def bundle(self) -> dict[str, float]:
        """What one replica asks Ray for: all on one node, and on a GPU machine all on one GPU."""
        bundle = {"CPU": PROCESS_CPUS * (1 + STAGES)}
        if self.device == "cuda":
            bundle["GPU"] = 1.0
            if self.accelerator is not None:
                bundle[f"accelerator_type:{self.accelerator}"] = 0.001
        elif self.accelerator is not None:
            bundle[self.accelerator] = 1.0  # a custom resource of that name: clusters that are simulated on CPUs
        return bundle

    def actors(self) -> ActorOptions:
        def options(gpu_share: float) -> dict[str, Any]:
            chosen: dict[str, Any] = {"num_cpus": PROCESS_CPUS}
            if self.device == "cuda":
                chosen["num_gpus"] = gpu_share
            return chosen

        return ActorOptions(options(CODEC_GPU_SHARE), options(ENGINE_GPU_SHARE), options(CODEC_GPU_SHARE))


class PersonaPlexReplica:
    """One placement group: the three stage actors, the frame loops that bind them, and a trunk for ingresses.

    No request reaches it through Serve, whose handles would cost 3 ms a frame and stream; Serve starts, watches,
    scales and stops it.
    """

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc] # Serve awaits it
        settings = plan.settings
        context = serve.get_replica_context()
        self._drain_s = settings.drain_s
        self._telemetry = Telemetry.to(settings.otlp_endpoint, settings.otlp_interval_s)
        # The vocabulary loads while the actors do.
        self._stages, pieces = await asyncio.gather(
            StageActors.start(
                plan.stage(settings.codec_threads), plan.stage(settings.threads_per_actor), plan.actors()
            ),
            asyncio.to_thread(load_pieces, settings.checkpoint),
        )
        name = context.replica_id.unique_id
        replica = Replica(
            self._stages.encoder,
            self._stages.converse,
            self._stages.decoder,
            slots=settings.slots,
            tokenizer=pieces,
            numerics_id=self._stages.numerics_id,
            settings=ReplicaSettings(window_s=_window_s(plan)),
            metrics=self._telemetry.frames(name),
        )
        config = HostConfig(
            name=name,
            node=ray.get_runtime_context().get_node_id(),
            trunk_host=settings.trunk_host or _node_address(),
            report_interval_s=settings.report_interval_s,
            trunk=plan.trunk,
        )
        self._host = ReplicaHost(replica, RouterClient(plan.router), config)
        self._replica = replica
        await self._host.start()

    async def check_health(self) -> None:
        """Serve replaces this replica when this raises."""
        self._host.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serving.autoscaling reads: busy slots here, callers waiting in the whole cluster."""
        return {"busy": float(self._replica.busy), "waiting": float(self._host.waiting)}

    async def __del__(self) -> None:
        """Serve awaits this before it kills the process: conversations end in peace, for at most `drain_s`."""
        if hasattr(self, "_host"):
            await self._host.stop(self._drain_s)
        if hasattr(self, "_stages"):
            self._stages.kill()
        if hasattr(self, "_telemetry"):
            await asyncio.to_thread(self._telemetry.close)


@serve.ingress()
class Ingress:
    """One per node: every socket of a client, and the conversations behind them."""

    def __init__(self, plan: Plan, replicas: object) -> None:
        """`replicas` only makes Serve deploy them first; frames go by trunk, not by handle."""
        settings, catalog = plan.settings, plan.catalog
        name = serve.get_replica_context().replica_id.unique_id
        self._telemetry = Telemetry.to(settings.otlp_endpoint, settings.otlp_interval_s)
        self._router = RouterClient(plan.router, ingress=name)
        self._trunks = TrunkPool(name, plan.trunk)
        self._hub = ConversationHub(
            self._router,
            self._trunks,
            Place(name, ray.get_runtime_context().get_node_id()),
            settings,
            telemetry=self._telemetry,
            has_voice=catalog.has_voice,
        )
        tenants = Tenants.load(settings.keys_file)
        model = ServedModel(catalog.model, catalog.trained, catalog.default_voice)
        chat = ChatEndpoint(self._hub, tenants, settings, model)
        self._parts = IngressParts(catalog, tenants, chat, self._router.status)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._parts, self._close)

    async def hang_up(self, reason: str) -> None:
        """End every conversation with a code that tells clients to come back; used before the system stops."""
        async with asyncio.timeout(HANG_UP_S):
            await self._hub.hang_up(reason)

    async def _close(self) -> None:
        await self._hub.close()
        await self._trunks.close()
        await asyncio.to_thread(self._telemetry.close)


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
        **_scale(settings),
        placement_group_bundles=[plan.bundle()],
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=settings.drain_s + 10.0,
    )(PersonaPlexReplica)
    ingress = serve.deployment(
        **common, num_replicas=settings.ingresses, max_replicas_per_node=1, graceful_shutdown_timeout_s=5.0
    )(Ingress)
    app: Application = ingress.bind(plan, replica.bind(plan))
    return app


def make_plan(settings: ServeSettings) -> Plan:
    """Decide what `auto` means on this machine."""
    device = settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = settings.accelerator
    if wanted == "auto":
        wanted = "H100" if device == "cuda" else "none"
    secret = settings.trunk_secret or secrets.token_urlsafe(32)
    return Plan(
        settings,
        Catalog.read(settings.checkpoint),
        device,
        None if wanted == "none" else wanted,
        TrunkConfig(secret, settings.trunk_ping_s, settings.trunk_dead_s),
    )


def _scale(settings: ServeSettings) -> dict[str, Any]:
    if settings.max_replicas == settings.min_replicas:
        return {"num_replicas": settings.min_replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call] # Ray
        policy_function="serving.autoscaling:ConversationPolicy",
        policy_kwargs={
            "slots_per_replica": settings.slots,
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "spare_slots": settings.spare_slots,
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


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call] # Ray


def _window_s(plan: Plan) -> float:
    """How long a first frame waits for company, out of its 80 ms."""
    if plan.settings.batch_window_s is not None:
        return plan.settings.batch_window_s
    return 0.004 if plan.device == "cuda" else 0.015

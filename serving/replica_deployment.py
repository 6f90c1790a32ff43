"""A replica as Serve deploys it: one GPU's worth of slots, in one placement group."""

from __future__ import annotations

import asyncio
import os

import ray
from ray import serve

from actors.interfaces import ReplicaSettings
from actors.journal import FRAMES_PER_S
from actors.promptly import at_leisure, promptly
from actors.replica import Replica
from actors.stage_config import StageConfig
from actors.stages_actor import ActorOptions, StageActors
from serving.logs import log_from
from serving.pieces import load_pieces
from serving.plan import Plan
from serving.replica_host import HostConfig, ReplicaHost, Stages
from serving.router_client import RouterClient
from serving.telemetry import Telemetry


class PersonaPlexReplica:
    """One placement group: the three stage actors, the frame loops that bind them, and a trunk for ingresses.

    No request reaches it through Serve, whose handles would cost 3 ms a frame and stream; Serve starts, watches,
    scales and stops it.
    """

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc] # Serve awaits it
        settings = plan.settings
        log_from(settings.log_level)
        context = serve.get_replica_context()
        self._drain_s = settings.drain_s
        self._telemetry = Telemetry.to(settings.otlp_endpoint, settings.otlp_interval_s)
        # The vocabulary loads while the actors do.
        self._stages, pieces = await asyncio.gather(
            StageActors.start(
                _stage(plan, settings.codec_threads),
                _stage(plan, settings.threads_per_actor),
                ActorOptions(plan.codec_options(), plan.engine_options(), plan.codec_options()),
            ),
            asyncio.to_thread(load_pieces, plan.nearest_checkpoint),
        )
        name = context.replica_id.unique_id
        replica = Replica(
            self._stages.encoder,
            self._stages.converse,
            self._stages.decoder,
            slots=plan.slots,
            tokenizer=pieces,
            numerics_id=self._stages.numerics_id,
            settings=ReplicaSettings(
                window_s=plan.window_s,
                receptive_s=self._stages.descriptions[0].receptive_frames / FRAMES_PER_S,
                resume_grace_s=settings.resume_grace_s,
            ),
            metrics=self._telemetry.frames(name),
        )
        config = HostConfig(
            name=name,
            node=ray.get_runtime_context().get_node_id(),
            trunk_host=settings.trunk_host or _node_address(),
            report_interval_s=settings.report_interval_s,
            trunk=plan.trunk,
        )
        self._host = ReplicaHost(replica, RouterClient(plan.router), config, self._repaired)
        self._replica = replica
        await self._host.start()
        promptly()

    async def _repaired(self, failed: str | None) -> Stages:
        """Three stages that work: a few seconds, where Serve's replacement loads everything anew."""
        await self._stages.repair(failed)
        return self._stages.encoder, self._stages.converse, self._stages.decoder

    async def check_health(self) -> None:
        """Serve replaces this replica when this raises: a stage died and could not be replaced, or the router wanted
        the replica emptied and it is."""
        self._host.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What serving.autoscaling reads: busy slots here, callers waiting in the whole cluster."""
        return {"busy": float(self._replica.busy), "waiting": float(self._host.waiting)}

    async def __del__(self) -> None:
        """Serve awaits this before it kills the process: conversations are taken elsewhere, or end, for at most
        `drain_s`, and no longer than it takes."""
        if hasattr(self, "_host"):
            await self._host.stop(self._drain_s)
        if hasattr(self, "_stages"):
            self._stages.kill()
        if hasattr(self, "_telemetry"):
            await asyncio.to_thread(self._telemetry.close)
        at_leisure(os.getpid())


def _stage(plan: Plan, threads: int) -> StageConfig:
    dtype = None if plan.settings.dtype == "auto" else plan.settings.dtype
    settings = plan.settings
    return StageConfig(
        settings.checkpoint,
        plan.slots,
        plan.device,
        dtype,
        threads,
        attention=settings.attention_backend,
        linear=settings.linear_backend,
        kv_dtype=settings.kv_dtype,
        kv_overcommit=settings.kv_overcommit,
        kv_reserve_s=settings.kv_reserve_s,
    )


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call] # Ray

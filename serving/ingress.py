"""The ingress as Serve deploys it: the one process that clients are connected to. Loads no torch."""

from __future__ import annotations

import asyncio
import os

import ray
from fastapi import FastAPI
from ray import serve

from actors.journal import FRAMES_PER_S
from actors.promptly import at_leisure, promptly
from serving.admin import admin_routes
from serving.api import IngressParts, build_api
from serving.guard import require_guard
from serving.ingress_chat import ChatEndpoint, ServedModel
from serving.logs import log_from
from serving.plan import Plan
from serving.resume import Tickets
from serving.router_client import RouterClient
from serving.session import ConversationHub, Place
from serving.telemetry import Telemetry
from serving.tenants import Tenants
from serving.trunk_client import TrunkPool

HANG_UP_S = 3.0


@serve.ingress()
class Ingress:
    """One per node: every socket of a client, and the conversations behind them."""

    def __init__(self, plan: Plan, replicas: object) -> None:
        """`replicas` only makes Serve deploy them first; frames go by trunk, not by handle."""
        settings, catalog = plan.settings, plan.catalog
        log_from(settings.log_level)
        require_guard()
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
            codec_s=catalog.codec_frames / FRAMES_PER_S,
        )
        tenants = Tenants.load(settings.keys_file)
        model = ServedModel.of(catalog)
        chat = ChatEndpoint(self._hub, tenants, settings, model, Tickets(plan.trunk.secret))
        admin = admin_routes(self._hub, self._router, self._trunks, tenants)
        self._parts = IngressParts(catalog, tenants, chat, self._router.status, admin)
        promptly()

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
        at_leisure(os.getpid())

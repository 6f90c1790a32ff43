"""The session router as a named Ray actor that is restarted for ever; who asks it uses serving.router_client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError

from actors.errors import ServingError
from actors.messages import ReplicaReport
from actors.promptly import promptly
from serving.logs import log_from
from serving.router import SessionRouter
from serving.routing import (
    AcquireRequest,
    Grant,
    ReplicaView,
    ReportReply,
    ResumeRequest,
    RouterConfig,
    RouterStatus,
    complete,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

NAME = "session-router"
NAMESPACE = "personaplex"
HEAD_RESOURCE = "node:__internal_head__"
TICKS_PER_LEASE, TICK_S = 6, 0.5  # the latter at most: who waits for the router to settle looks again at each
RETRY_EVERY_S = 0.2
REPLACE_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of ours as a value: an expected refusal is no failed task in Ray's logs and metrics."""

    code: str
    message: str
    next_step: str


class RouterShell:
    """Runs a SessionRouter in an actor's event loop and keeps its clock going."""

    def __init__(self, config: RouterConfig) -> None:
        log_from(config.log_level)
        # Milliseconds since 1970: nobody is given an epoch a millisecond, so no former router has come so far.
        self._router = SessionRouter(config, incarnation=uuid4().hex[:8], epochs_before=time.time_ns() // 1_000_000)
        self._ticking: asyncio.Task[None] | None = None
        promptly()

    async def acquire(self, request: AcquireRequest) -> Grant | Refusal:
        return await self._or_refusal(self._router.acquire(complete(request)))

    async def prepare(self, request: AcquireRequest) -> Grant | Refusal:
        return await self._or_refusal(self._router.prepare(complete(request)))

    async def commit(self, session: str, epoch: int, ingress: str) -> Refusal | None:
        return await self._or_refusal(self._router.commit(session, epoch, ingress))

    async def resume(self, request: ResumeRequest) -> Grant | Refusal:
        return await self._or_refusal(self._router.resume(complete(request)))

    async def unspend(self, session: str, epoch: int, ingress: str) -> None:
        try:
            self._router.unspend(session, epoch, ingress)
        except ServingError as error:
            log.info("unspend: %s", error)

    async def release(self, session: str, epoch: int, ingress: str, opened: bool) -> None:
        try:
            self._router.release(session, epoch, ingress, opened=opened)
        except ServingError as error:
            log.info("release: %s", error)  # it had run out, or its replica had ended it

    async def abandon(self, session: str, ingress: str, after_epoch: int) -> None:
        self._router.abandon(session, ingress, after_epoch)

    async def locate(self, session: str) -> Grant | None:
        self._keep_ticking()
        return await self._router.locate(session)

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return self._router.replicas()

    async def drain(self, replica: str) -> Refusal | None:
        try:
            self._router.drain(replica)
        except ServingError as error:
            return _refusal(error)
        return None

    async def report(self, report: ReplicaReport) -> ReportReply:
        self._keep_ticking()
        for slot in complete(report).busy:
            complete(slot)
        return self._router.report(report)

    async def forget(self, replica: str) -> None:
        self._router.forget(replica)

    async def status(self) -> RouterStatus:
        return self._router.status()

    async def _or_refusal(self, answer: Coroutine[Any, Any, T]) -> T | Refusal:
        self._keep_ticking()
        try:
            return await answer
        except ServingError as error:
            return _refusal(error)

    def _keep_ticking(self) -> None:
        # Not in __init__: Ray runs that outside the loop that runs the methods.
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(min(self._router.config.lease_s / TICKS_PER_LEASE, TICK_S))
            for lease in self._router.tick():
                log.warning("the lease of session %s on %s ran out", lease.session, lease.replica)


def _refusal(error: ServingError) -> Refusal:
    return Refusal(error.code, error.message, error.next_step)


def start_router(config: RouterConfig) -> Any:
    """The router's handle; starts it where none runs. It outlives whoever started it, and its own death.

    Blocks for a round trip to Ray's head, and as long as that is away.
    """
    return (
        ray.remote(RouterShell)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=10_000,  # callers in the line each hold a call open
            num_cpus=0,
            # On the head: not where replicas live, whose nodes come and go. Without the head nobody could start it
            # elsewhere either. By the resource that every head has, also the one that takes a dead one's place; node
            # affinity, by contrast, Ray 2.60 does not keep for an actor that needs nothing (tried: any node).
            resources={HEAD_RESOURCE: 0.001},
        )
        .remote(config)
    )


def replace_router(config: RouterConfig) -> None:
    """A router of this build with these settings, in place of whichever runs. It is rebuilt from the replicas' reports,
    as after a death; those who ask it something meanwhile wait a second or two. Raises TimeoutError."""
    try:
        former = ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        start_router(config)
        return
    ray.kill(former, no_restart=True)
    deadline_s = time.monotonic() + REPLACE_WITHIN_S
    while True:  # until the name is free
        try:
            router = start_router(config)
            if router._actor_id != former._actor_id:
                ray.get(router.status.remote(), timeout=REPLACE_WITHIN_S)
                return
        except (RayActorError, ValueError) as error:
            log.info("the former router is not quite gone: %s", type(error).__name__)
        if time.monotonic() >= deadline_s:
            raise TimeoutError("the former session router could not be replaced: is the cluster's head well?")
        time.sleep(RETRY_EVERY_S)

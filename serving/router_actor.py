"""The session router as a named Ray actor that is restarted for ever, and the client that ingress and replica use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.errors import NoCapacity, ServingError, from_code
from actors.messages import ReplicaReport
from serving.router import AcquireRequest, Grant, ReportReply, RouterConfig, RouterStatus, SessionRouter

log = logging.getLogger(__name__)
T = TypeVar("T")

NAME = "session-router"
NAMESPACE = "personaplex"
TICKS_PER_LEASE = 6
# A killed router is back after 1-2 s and knows everything after one report more. Callers wait that long for it.
RETRY_FOR_S = 8.0
RETRY_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of ours as a value: an expected refusal is no failed task in Ray's logs and metrics."""

    code: str
    message: str
    next_step: str


class RouterShell:
    """Runs a SessionRouter in an actor's event loop and keeps its clock going."""

    def __init__(self, config: RouterConfig) -> None:
        self._router = SessionRouter(config, incarnation=uuid4().hex[:8])
        self._ticking: asyncio.Task[None] | None = None

    async def acquire(self, request: AcquireRequest) -> Grant | Refusal:
        self._keep_ticking()
        try:
            return await self._router.acquire(request)
        except ServingError as error:
            return Refusal(error.code, error.message, error.next_step)

    async def release(self, session: str, epoch: int, ingress: str, opened: bool) -> None:
        try:
            self._router.release(session, epoch, ingress, opened=opened)
        except ServingError as error:
            log.info("release: %s", error)  # it had run out, or its replica had ended it

    async def abandon(self, session: str, ingress: str) -> None:
        self._router.abandon(session, ingress)

    async def report(self, report: ReplicaReport) -> ReportReply:
        self._keep_ticking()
        return self._router.report(report)

    async def forget(self, replica: str) -> None:
        self._router.forget(replica)

    async def status(self) -> RouterStatus:
        return self._router.status()

    def _keep_ticking(self) -> None:
        # Not in __init__: Ray runs that outside the loop that runs the methods.
        if self._ticking is None or self._ticking.done():
            self._ticking = asyncio.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._router.config.lease_s / TICKS_PER_LEASE)
            for lease in self._router.tick():
                log.warning("the lease of session %s on %s ran out", lease.session, lease.replica)


def start_router(config: RouterConfig) -> Any:
    """The router's handle; starts it where none runs. It outlives whoever started it, and its own death."""
    return (
        ray.remote(RouterShell)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=10_000,  # callers in the queue each hold a call open
            num_cpus=0,
        )
        .remote(config)
    )


class RouterClient:
    """serving.session.RouterPort over Ray. One per process; finds the router again after its death."""

    def __init__(self, config: RouterConfig, ingress: str = "") -> None:
        self._config = config
        self._ingress = ingress
        self._router = start_router(config)

    async def acquire(self, request: AcquireRequest) -> Grant:
        """Raises what the router raises, and NoCapacity when it cannot be reached."""
        outcome = await self._insist(lambda: self._router.acquire.remote(request))
        if isinstance(outcome, Refusal):
            raise from_code(outcome.code, outcome.message, outcome.next_step)
        assert isinstance(outcome, Grant)
        return outcome

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        """Never raises: a release that is lost is made good by the replica's next report."""
        await self._once(self._router.release.remote(session, epoch, self._ingress, opened))

    async def abandon(self, session: str) -> None:
        await self._once(self._router.abandon.remote(session, self._ingress))

    async def report(self, report: ReplicaReport) -> ReportReply:
        """Raises ConnectionError while the router is away: report again at the next beat."""
        try:
            reply = await self._router.report.remote(report)
        except RayActorError as error:
            self._router = start_router(self._config)
            raise ConnectionError(type(error).__name__) from error
        assert isinstance(reply, ReportReply)
        return reply

    async def forget(self, replica: str) -> None:
        await self._once(self._router.forget.remote(replica))

    async def status(self) -> RouterStatus:
        """Raises NoCapacity when the router cannot be reached."""
        status = await self._insist(lambda: self._router.status.remote())
        assert isinstance(status, RouterStatus)
        return status

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        deadline_s = asyncio.get_running_loop().time() + RETRY_FOR_S
        while True:
            try:
                return await call()
            except RayActorError as error:
                if asyncio.get_running_loop().time() >= deadline_s:
                    raise NoCapacity("The session router cannot be reached.") from error
                log.warning("the session router is away: %s", type(error).__name__)
            await asyncio.sleep(RETRY_EVERY_S)
            self._router = start_router(self._config)

    async def _once(self, answer: Awaitable[None]) -> None:
        try:
            await answer
        except (RayActorError, RayTaskError) as error:
            log.warning("the session router did not hear us: %s", type(error).__name__)

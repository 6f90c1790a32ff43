"""The session router as a named Ray actor that is restarted for ever, and the client that ingress and replica use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import NoCapacity, ServingError, from_code
from actors.messages import ReplicaReport
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
TICKS_PER_LEASE = 6
# A killed router is back after 1-2 s and knows everything after one report more. Callers wait that long for it.
RETRY_FOR_S = 8.0
RETRY_EVERY_S = 0.2
REPLACE_WITHIN_S = 20.0
# Somebody who deploys replaces it: whoever misses it looks for the new one, and starts one only when there is none.
LOOK_FOR_S = 5.0


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
            await asyncio.sleep(self._router.config.lease_s / TICKS_PER_LEASE)
            for lease in self._router.tick():
                log.warning("the lease of session %s on %s ran out", lease.session, lease.replica)


def _refusal(error: ServingError) -> Refusal:
    return Refusal(error.code, error.message, error.next_step)


def start_router(config: RouterConfig) -> Any:
    """The router's handle; starts it where none runs. It outlives whoever started it, and its own death.

    Blocks for a round trip to Ray's head, and as long as that is away.
    """
    options: dict[str, Any] = {}
    head = _head_node()
    if head is not None:
        # Not where replicas live, whose nodes come and go: it need not die with one of them. Soft: better elsewhere
        # than nowhere.
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(head, soft=True)
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
            **options,
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


def _head_node() -> str | None:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call] # Ray
    heads = [node["NodeID"] for node in nodes if node["Alive"] and "node:__internal_head__" in node["Resources"]]
    return heads[0] if heads else None


class RouterClient:
    """serving.routing.RouterPort over Ray. One per process; finds the router again after its death."""

    def __init__(self, config: RouterConfig, ingress: str = "") -> None:
        self._config = config
        self._ingress = ingress
        self._router = start_router(config)
        self._search: asyncio.Task[None] | None = None

    async def acquire(self, request: AcquireRequest) -> Grant:
        """Raises what the router raises, and NoCapacity when it cannot be reached."""
        return await self._grant(lambda: self._router.acquire.remote(request), request.wait_s)

    async def prepare(self, request: AcquireRequest) -> Grant:
        """As `acquire`."""
        return await self._grant(lambda: self._router.prepare.remote(request), request.wait_s)

    async def commit(self, session: str, epoch: int) -> None:
        """Raises what the router raises, and ConnectionError when it cannot be reached."""
        try:
            refusal = await self._insist(lambda: self._router.commit.remote(session, epoch, self._ingress))
        except NoCapacity as error:
            raise ConnectionError(error.message) from error
        _raise_if_refused(refusal)

    async def resume(self, request: ResumeRequest) -> Grant:
        """As `acquire`."""
        return await self._grant(lambda: self._router.resume.remote(request))

    async def unspend(self, session: str, epoch: int) -> None:
        """Never raises: at worst the conversation cannot be resumed, and ends when its grace is over."""
        await self._once(lambda: self._router.unspend.remote(session, epoch, self._ingress))

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        """Never raises: a release that is lost is made good by the replica's next report."""
        await self._once(lambda: self._router.release.remote(session, epoch, self._ingress, opened))

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        """Never raises: what was granted runs out by itself."""
        await self._once(lambda: self._router.abandon.remote(session, self._ingress, after_epoch))

    async def locate(self, session: str) -> Grant | None:
        """Raises NoCapacity when the router cannot be reached."""
        grant = await self._insist(lambda: self._router.locate.remote(session))
        assert grant is None or isinstance(grant, Grant)
        return None if grant is None else complete(grant)

    async def replicas(self) -> tuple[ReplicaView, ...]:
        """As `locate`."""
        views = await self._insist(lambda: self._router.replicas.remote())
        assert isinstance(views, tuple)
        return tuple(complete(view) for view in views)

    async def drain(self, replica: str) -> None:
        """Raises UnknownReplica, and NoCapacity when the router cannot be reached."""
        _raise_if_refused(await self._insist(lambda: self._router.drain.remote(replica)))

    async def report(self, report: ReplicaReport) -> ReportReply:
        """Raises ConnectionError while the router is away: report again at the next beat."""
        try:
            reply = await self._router.report.remote(report)
        except RayError as error:
            self._search_router()
            raise ConnectionError(type(error).__name__) from error
        assert isinstance(reply, ReportReply)
        return complete(reply)

    async def forget(self, replica: str) -> None:
        await self._once(lambda: self._router.forget.remote(replica))

    async def status(self) -> RouterStatus:
        """Raises NoCapacity when the router cannot be reached."""
        status = await self._insist(lambda: self._router.status.remote())
        assert isinstance(status, RouterStatus)
        return complete(status)

    async def _grant(self, call: Callable[[], Awaitable[object]], patience_s: float = 0.0) -> Grant:
        outcome = await self._insist(call, patience_s)
        _raise_if_refused(outcome)
        assert isinstance(outcome, Grant)
        return complete(outcome)

    async def _insist(self, call: Callable[[], Awaitable[T]], patience_s: float = 0.0) -> T:
        deadline_s = asyncio.get_running_loop().time() + max(patience_s, RETRY_FOR_S)
        while True:
            try:
                return await call()
            except RayActorError as error:
                if asyncio.get_running_loop().time() >= deadline_s:
                    raise NoCapacity("The session router cannot be reached.") from error
                log.warning("the session router is away: %s", type(error).__name__)
            self._search_router()
            await asyncio.sleep(RETRY_EVERY_S)

    async def _once(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except RayError as error:
            log.warning("the session router did not hear us: %s", type(error).__name__)

    def _search_router(self) -> None:
        """Ask Ray for the router again, in a thread: while the head is away that takes until it is back, and this loop
        carries live frames meanwhile."""
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._find_router())

    async def _find_router(self) -> None:
        try:
            self._router = await asyncio.to_thread(_find_or_start, self._config)
        except (RayError, ValueError, RuntimeError) as error:  # ValueError: it died while Ray looked its name up
            log.warning("the session router was not found: %s", error)


def _find_or_start(config: RouterConfig) -> Any:
    deadline_s = time.monotonic() + LOOK_FOR_S
    while True:
        try:
            return ray.get_actor(NAME, NAMESPACE)
        except ValueError:
            if time.monotonic() >= deadline_s:
                return start_router(config)
        time.sleep(RETRY_EVERY_S)


def _raise_if_refused(outcome: object) -> None:
    if isinstance(outcome, Refusal):
        raise from_code(outcome.code, outcome.message, outcome.next_step)

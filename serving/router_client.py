"""The session router as ingresses and replicas see it: a Ray actor that dies, comes back, is replaced by a deploy."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from actors.errors import NoCapacity, from_code
from actors.messages import ReplicaReport
from serving.router_actor import NAME, NAMESPACE, Refusal, start_router
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

# A killed router is back after 1-2 s and knows everything after one report more. Callers wait that long for it.
RETRY_FOR_S = 8.0
RETRY_EVERY_S = 0.2
# Somebody who deploys replaces it: whoever misses it looks for the new one, and starts one only when there is none.
LOOK_FOR_S = 5.0


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
            reply = await _answer(self._router.report.remote(report), self._config.lease_s)
        except ConnectionError:
            self._search_router()
            raise
        except RayTaskError as error:  # its fault costs no replica
            log.error("the session router failed: %s", error)
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
        deadline_s = asyncio.get_running_loop().time() + patience_s + RETRY_FOR_S
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                return await _answer(call(), left_s)
            except ConnectionError as error:
                if left_s <= RETRY_EVERY_S:
                    raise NoCapacity("The session router cannot be reached.") from error
                log.warning("the session router is away: %s", error)
            self._search_router()
            await asyncio.sleep(RETRY_EVERY_S)

    async def _once(self, call: Callable[[], Awaitable[None]]) -> None:
        try:
            await _answer(call(), RETRY_FOR_S)
        except (ConnectionError, RayTaskError) as error:
            log.warning("the session router did not hear us: %s", error)

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


async def _answer(answer: Awaitable[T], within_s: float) -> T:
    """The router's answer; ConnectionError if it is dead, or silent: while Ray's head is away, a call to an actor that
    died with it stays unanswered until the head is back."""
    try:
        async with asyncio.timeout(within_s):
            return await answer
    except TimeoutError as error:
        raise ConnectionError(f"no answer within {within_s:.1f} s") from error
    except RayTaskError:
        raise  # it answered: a fault of its own, which asking again would not mend
    except RayError as error:
        raise ConnectionError(type(error).__name__) from error


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

"""The router as an ingress in the same process sees it, for `Holding`, with which real ingresses ask."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from actors.errors import ServingError
from serving.router import SessionRouter
from serving.routing import AcquireRequest, Grant, ReplicaView, ResumeRequest


class IngressLine:
    """RouterPort of one ingress. `router` says which one lives now: a dead one is replaced by another."""

    def __init__(self, ingress: str, router: Callable[[], SessionRouter]) -> None:
        self.ingress, self.router = ingress, router

    async def acquire(self, request: AcquireRequest) -> Grant:
        return await self.answer(self.router().acquire(request))

    async def prepare(self, request: AcquireRequest) -> Grant:
        return await self.answer(self.router().prepare(request))

    async def resume(self, request: ResumeRequest) -> Grant:
        return await self.answer(self.router().resume(request))

    async def commit(self, session: str, epoch: int) -> None:
        await self.router().commit(session, epoch, self.ingress)

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        self.tell(lambda: self.router().release(session, epoch, self.ingress, opened=opened))

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        self.tell(lambda: self.router().abandon(session, self.ingress, after_epoch))

    async def unspend(self, session: str, epoch: int) -> None:
        self.tell(lambda: self.router().unspend(session, epoch, self.ingress))

    async def locate(self, session: str) -> Grant | None:
        return await self.router().locate(session)

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return self.router().replicas()

    async def drain(self, replica: str) -> None:
        self.router().drain(replica)

    # ---- how it gets there; for whoever wants it otherwise ------------------------------------------------------

    async def answer(self, asked: Awaitable[Grant]) -> Grant:
        return await asked

    def tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(ServingError):  # it had run out
            what()

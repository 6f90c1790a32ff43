"""A router, its clock, and replicas that report what they really hold: for tests."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from actors.messages import ReplicaReport, SlotReport
from serving.router import SessionRouter
from serving.routing import AcquireRequest, Grant, ResumeRequest, RouterConfig

LEASE_S = 3.0


class Stage:
    """A router, its clock, and replicas that report what they really hold: session → (epoch, live)."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.now_s = 0.0
        self.config = config or RouterConfig(lease_s=LEASE_S, settle_s=0.0)
        self.router = SessionRouter(self.config, lambda: self.now_s, epochs_before=1000)
        self.held: dict[str, dict[str, tuple[int, bool]]] = {}
        self.slots: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        self.not_admitting: set[str] = set()

    def start(self, replica: str, slots: int = 4) -> None:
        self.held[replica], self.slots[replica] = {}, slots
        self.report(replica)

    def report(self, *replicas: str) -> tuple[tuple[str, int], ...]:
        """What the last of them is told to close; nobody closes it."""
        closed: tuple[tuple[str, int], ...] = ()
        for replica in replicas or tuple(self.held):
            busy = tuple(
                SlotReport(session, epoch, "acme", slot, self.owners.get(session, "i1"), live=live)
                for slot, (session, (epoch, live)) in enumerate(self.held[replica].items())
            )
            admitting = replica not in self.not_admitting
            reply = self.router.report(
                ReplicaReport(replica, f"node of {replica}", replica, self.slots[replica], "id", admitting, busy)
            )
            closed = reply.close
        return closed

    def hold(self, grant: Grant, live: bool = True) -> None:
        """The replica has opened what was granted."""
        self.held[grant.replica][grant.session] = (grant.epoch, live)
        self.report(grant.replica)

    async def call(self, session: str, **changed: object) -> Grant:
        """A conversation, opened and live."""
        grant = await self.router.acquire(ask(session, **changed))
        self.hold(grant)
        return grant

    def pass_s(self, seconds: float, silent: Sequence[str] = ()) -> None:
        """Half a second at a time, in which all but the silent replicas report."""
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            self.report(*(replica for replica in self.held if replica not in silent))
            self.router.tick()

    def view(self, replica: str) -> tuple[int, int, int]:
        """(busy, arriving, free)"""
        found = next(view for view in self.router.replicas() if view.replica == replica)
        return found.busy, found.arriving, found.free


def ask(session: str, **changed: object) -> AcquireRequest:
    return dataclasses.replace(AcquireRequest(session, "acme", None, "i1", "elsewhere"), **changed)  # type: ignore[arg-type]


def back(session: str, serial: int, ingress: str = "i2", tenant: str = "acme") -> ResumeRequest:
    return ResumeRequest(session, serial, tenant, ingress, "elsewhere")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)

"""A replica in its process: its frame loops, its trunk, and its heartbeat to the router. Plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from actors.errors import Draining, EngineLost
from actors.interfaces import Clock, CodecHandle, ConverseHandle, MonotonicClock
from actors.messages import ReplicaReport, SlotReport
from serving.routing import ReportReply
from serving.trunk_link import ReplicaPort
from serving.trunk_server import TrunkConfig, TrunkServer

log = logging.getLogger(__name__)

PROBE_EVERY_S = 1.0  # three calls of some 2 ms, half a percent of a core
# A replica whose stages die again and again is better begun anew as a whole, by Serve and perhaps elsewhere.
MOST_REPAIRS, REPAIRS_WITHIN_S = 3, 300.0

Stages = tuple[CodecHandle, ConverseHandle, CodecHandle]


class HostedReplica(ReplicaPort, Protocol):
    """actors.replica.Replica, as far as its host knows it."""

    numerics_id: str

    @property
    def slots(self) -> int: ...

    @property
    def busy(self) -> int: ...

    @property
    def room(self) -> int | None: ...

    @property
    def admitting(self) -> bool: ...

    @property
    def drained(self) -> bool: ...

    @property
    def fault(self) -> EngineLost | None: ...

    @property
    def failed_stage(self) -> str | None: ...

    async def run(self) -> None: ...

    async def probe(self) -> None: ...

    async def stop(self, reason: str = ...) -> None: ...

    def drain(self) -> None: ...

    def revive(self, encoder: CodecHandle, converse: ConverseHandle, decoder: CodecHandle) -> None: ...

    def renewed(self, at_s: float, lease_s: float) -> None: ...

    def revoke(self, session: str, epoch: int, reason: str) -> None: ...

    def report(self) -> list[SlotReport]: ...

    def on_change(self, tell: Callable[[], None]) -> None: ...


class ReportPort(Protocol):
    """The router, for a replica. Both may raise ConnectionError while it is away."""

    async def report(self, report: ReplicaReport) -> ReportReply: ...

    async def forget(self, replica: str) -> None: ...


@dataclass(frozen=True, slots=True)
class HostConfig:
    """`name` and `node` are the replica's in every report; `trunk_host` is the address its trunk binds."""

    name: str
    node: str
    trunk_host: str
    report_interval_s: float
    trunk: TrunkConfig


class ReplicaHost:
    """Runs one replica from `start` to `stop` and tells the router what it holds."""

    def __init__(
        self,
        replica: HostedReplica,
        router: ReportPort,
        config: HostConfig,
        repair: Callable[[str | None], Awaitable[Stages]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """repair: given the stage that failed, as far as that is known, brings up three that work and hold nothing;
        without it, or when it raises, a dead stage is the end of this replica and `check` says so."""
        self._replica = replica
        self._router = router
        self._config = config
        self._repair = repair
        self._clock: Clock = clock or MonotonicClock()
        self._trunk = TrunkServer(replica, config.name, config.trunk)
        self._address = ""
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._repairs_s: list[float] = []  # when they were begun
        self._beyond_repair = repair is None
        self._unwanted = False  # the router wants it empty
        self.waiting = 0  # callers in the router's queue, as of its last answer
        replica.on_change(self.changed)

    async def start(self) -> None:
        """Open the trunk, start the frame loops, and be known to the router."""
        self._address = await self._trunk.start(self._config.trunk_host)
        self._tasks = [asyncio.create_task(loop()) for loop in (self._live, self._beat, self._probe)]

    async def stop(self, drain_s: float) -> None:
        """Take nobody new, have conversations taken elsewhere or end for at most `drain_s`, then end everything.

        It returns as soon as nobody is left.
        """
        self._replica.drain()
        self.changed()
        try:
            async with asyncio.timeout(drain_s):
                while self._replica.busy and self._replica.fault is None:
                    await self._beat_or(self._news)
        except TimeoutError:
            log.warning("%d conversations outlived the drain of %g s", self._replica.busy, drain_s)
        for task in self._tasks[1:]:  # not the frame loops: `stop` ends those
            task.cancel()
        await self._replica.stop()
        await self._trunk.stop()
        self._tasks[0].cancel()  # it may be at a repair
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._router.forget(self._config.name)
        except ConnectionError as error:
            log.warning("the router did not hear that we are gone, and will notice: %s", error)

    def changed(self) -> None:
        """Something came or went: the router is told now, not at the next beat."""
        self._news.set()
        self._news = asyncio.Event()

    def report(self) -> ReplicaReport:
        """What this replica holds. A slot that is still being wiped is neither busy nor there."""
        held = tuple(self._replica.report())
        return ReplicaReport(
            replica=self._config.name,
            node=self._config.node,
            address=self._address,
            slots=self._replica.slots - max(0, self._replica.busy - len(held)),
            numerics_id=self._replica.numerics_id,
            admitting=self._replica.admitting,
            busy=held,
            room=self._replica.room,
        )

    def check(self) -> None:
        """Raises EngineLost when a stage has died and is not being replaced, Draining once the router's wish to have
        this replica emptied is fulfilled, RuntimeError when a loop of this process has ended."""
        if self._replica.fault is not None and self._beyond_repair:
            raise self._replica.fault
        if self._unwanted and self._replica.drained:
            raise Draining("This replica has been emptied, as was asked of it.")
        for task in self._tasks:
            if task.done():  # without a fault none of them ends
                raise RuntimeError("a loop of the replica has ended") from task.exception()

    async def _live(self) -> None:
        """The frame loops, begun anew with other stages as often as that helps."""
        while True:
            await self._replica.run()
            if self._replica.fault is None:
                return
            self._beyond_repair = not self._worth_a_repair()
            if self._repair is None or self._beyond_repair:
                return
            failed = self._replica.failed_stage
            log.warning("replacing %s", f"the {failed}" if failed else "all three stages")
            try:
                stages = await self._repair(failed)
            except Exception:
                log.exception("the stages could not be replaced")
                self._beyond_repair = True
                return
            self._replica.revive(*stages)

    def _worth_a_repair(self) -> bool:
        """Whether this fault can be mended, and is not one of many."""
        if self._repair is None:
            return False
        now_s = self._clock.now()
        self._repairs_s = [then_s for then_s in self._repairs_s if then_s > now_s - REPAIRS_WITHIN_S]
        if len(self._repairs_s) >= MOST_REPAIRS:
            log.error("%d stages died within %g s: giving up", MOST_REPAIRS + 1, REPAIRS_WITHIN_S)
            return False
        self._repairs_s.append(now_s)
        return True

    async def _beat(self) -> None:
        while True:
            news = self._news  # what changes from here on is not in this report
            sent_s = self._clock.now()
            try:
                reply = await self._router.report(self.report())
            except ConnectionError as error:
                log.warning("the router did not hear us: %s", error)  # leases outlive some beats
            else:
                self._obey(reply, sent_s)
            await self._beat_or(news)

    def _obey(self, reply: ReportReply, sent_s: float) -> None:
        self.waiting = reply.waiting
        self._replica.renewed(sent_s, reply.lease_s)
        for session, epoch in reply.close:
            log.warning("session %s epoch %d has no lease: closing it", session, epoch)
            self._replica.revoke(session, epoch, "The lease of the conversation has ended.")
        if reply.drain:
            self._unwanted = True
            self._replica.drain()

    async def _probe(self) -> None:
        """Frames find a dead stage at once; this finds it when there are none."""
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            if self._replica.fault is None:
                await self._replica.probe()

    async def _beat_or(self, news: asyncio.Event) -> None:
        """Until something changes, at most one beat."""
        try:
            async with asyncio.timeout(self._config.report_interval_s):
                await news.wait()
        except TimeoutError:
            return

"""A replica in its process: its frame loops, its trunk, and its heartbeat to the router. Plain asyncio, no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from actors.errors import EngineLost, StaleEpoch
from actors.messages import Down, DownSink, Failed, FrameIn, OpenRequest, ReplicaReport, SlotReport
from serving.router import ReportReply
from serving.trunk_server import TrunkConfig, TrunkServer

log = logging.getLogger(__name__)

PROBE_EVERY_S = 1.0  # three calls of some 2 ms, half a percent of a core


class HostedReplica(Protocol):
    """actors.replica.Replica, as far as its host knows it."""

    numerics_id: str

    @property
    def slots(self) -> int: ...

    @property
    def busy(self) -> int: ...

    @property
    def admitting(self) -> bool: ...

    @property
    def fault(self) -> EngineLost | None: ...

    async def run(self) -> None: ...

    async def probe(self) -> None: ...

    async def stop(self, reason: str = ...) -> None: ...

    def drain(self) -> None: ...

    def report(self) -> list[SlotReport]: ...

    async def open(self, request: OpenRequest, sink: DownSink) -> None: ...

    def offer(self, frame: FrameIn) -> None: ...

    async def close(self, session: str, epoch: int, reason: str) -> None: ...


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

    def __init__(self, replica: HostedReplica, router: ReportPort, config: HostConfig) -> None:
        self._replica = replica
        self._router = router
        self._config = config
        self._watched = _Watched(replica, self.changed)
        self._trunk = TrunkServer(self._watched, config.name, config.trunk)
        self._address = ""
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.waiting = 0  # callers in the router's queue, as of its last answer

    async def start(self) -> None:
        """Open the trunk, start the frame loops, and be known to the router."""
        self._address = await self._trunk.start(self._config.trunk_host)
        self._tasks = [asyncio.create_task(loop()) for loop in (self._replica.run, self._beat, self._probe)]

    async def stop(self, drain_s: float) -> None:
        """Take nobody new, let conversations end for at most `drain_s`, then end everything."""
        self._replica.drain()
        self.changed()
        try:
            async with asyncio.timeout(drain_s):
                while self._replica.busy and self._replica.fault is None:
                    await self._beat_or(self._news)
        except TimeoutError:
            log.warning("%d conversations outlived the drain of %g s", self._replica.busy, drain_s)
        await self._replica.stop()
        await self._trunk.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._router.forget(self._config.name)

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
        )

    def check(self) -> None:
        """Raises EngineLost when a stage has died, RuntimeError when a loop of this process has."""
        if self._replica.fault is not None:
            raise self._replica.fault
        for task in self._tasks:
            if task.done():  # without a fault none of them ends
                raise RuntimeError("a loop of the replica has ended") from task.exception()

    async def _beat(self) -> None:
        while True:
            news = self._news  # what changes from here on is not in this report
            try:
                reply = await self._router.report(self.report())
            except ConnectionError as error:
                log.warning("the router did not hear us: %s", error)  # leases outlive some beats
            else:
                self.waiting = reply.waiting
                for session, epoch in reply.close:
                    log.warning("session %s epoch %d has no lease: closing it", session, epoch)
                    await self._watched.fence(session, epoch)
            await self._beat_or(news)

    async def _probe(self) -> None:
        """Frames find a dead stage at once; this finds it when there are none."""
        while self._replica.fault is None:
            await asyncio.sleep(PROBE_EVERY_S)
            await self._replica.probe()
        self.changed()

    async def _beat_or(self, news: asyncio.Event) -> None:
        """Until something changes, at most one beat."""
        try:
            async with asyncio.timeout(self._config.report_interval_s):
                await news.wait()
        except TimeoutError:
            return


class _Watched:
    """A replica whose comings and goings are noticed; what the trunk server drives."""

    def __init__(self, replica: HostedReplica, changed: Callable[[], None]) -> None:
        self._replica = replica
        self._changed = changed
        self._sinks: dict[tuple[str, int], DownSink] = {}

    async def open(self, request: OpenRequest, sink: DownSink) -> None:
        key = (request.session, request.epoch)

        def noticing(message: Down) -> None:
            if isinstance(message, Failed):
                self._sinks.pop(key, None)
                self._changed()
            sink(message)

        self._sinks[key] = sink
        try:
            await self._replica.open(request, noticing)
        except BaseException:
            self._sinks.pop(key, None)
            raise
        self._changed()

    def offer(self, frame: FrameIn) -> None:
        self._replica.offer(frame)

    async def close(self, session: str, epoch: int, reason: str) -> None:
        self._sinks.pop((session, epoch), None)
        await self._replica.close(session, epoch, reason)
        self._changed()

    async def fence(self, session: str, epoch: int) -> None:
        """End a conversation that lost its lease. Unlike a close it is nobody's wish, so its ingress is told."""
        sink = self._sinks.pop((session, epoch), None)
        if sink is not None:
            sink(Failed(session, epoch, StaleEpoch.code, "The lease of the conversation has ended."))
        await self.close(session, epoch, "no lease")

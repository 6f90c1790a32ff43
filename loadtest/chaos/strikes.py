"""What is done to the system in each scenario. Every strike says what it hit; one that hits nothing raises Missed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from loadtest.chaos.journals import AdminClient
from loadtest.chaos.system import System

Node = dict[str, Any]

FROZEN_S = 12.0  # longer than leases, heartbeats and recoveries: what thaws is a zombie
HEAD_AWAY_S = 4.0
_QUESTIONS = 12  # the proxy asks the idler of two ingresses, so perhaps never the other one
SHRUNK_S = 3.0  # by then Serve has chosen who goes

_REPLICA, _INGRESS = "ray::ServeReplica:personaplex:PersonaPlexReplica", "ray::ServeReplica:personaplex:Ingress"
_STAGES = {"engine": "ray::EngineShell", "encoder": "ray::EncoderShell", "decoder": "ray::DecoderShell"}


class Missed(RuntimeError):
    """There was nothing to strike: the scenario shows nothing."""


class Striker:
    """Strikes one system. `homes` tells on which replica each call is at the moment."""

    def __init__(
        self, system: System, admin: AdminClient, homes: Callable[[], Iterable[str]], draw: random.Random
    ) -> None:
        self._system = system
        self._admin = admin
        self._homes = homes
        self._draw = draw
        self._mending: set[asyncio.Task[None]] = set()

    async def strike(self, scenario: str) -> str:
        """Strikes once and returns what was hit. What mends it afterwards goes on by itself. Raises Missed."""
        strikes: dict[str, Callable[[], Awaitable[str]]] = {
            "replica": lambda: self._kill_beside_calls("replica", _REPLICA),
            "ingress": self._ingress,
            "router": lambda: self._kill_any("router", "ray::RouterShell"),
            "controller": lambda: self._kill_any("controller", "ray::ServeController"),
            "node": self._node,
            "head": self._head,
            "drain": self._drain,
            "scale-down": self._scale_down,
            "deploy": self._deploy,
            "partition": self._partition,
        } | {
            stage: lambda stage=stage, title=title: self._kill_beside_calls(stage, title)  # type: ignore[misc]
            for stage, title in _STAGES.items()
        }
        return await strikes[scenario]()

    async def mended(self) -> None:
        """Waits for what was begun. Raises what went wrong in it."""
        await asyncio.gather(*self._mending)

    async def _kill_beside_calls(self, what: str, title: str) -> str:
        node, calls = await self._busy_node()
        process = self._one(_titled(node, title), what)
        os.kill(process, signal.SIGKILL)
        return f"{what} (process {process}) on node {node['index']}, {calls}"

    async def _kill_any(self, what: str, title: str) -> str:
        process = self._one(await self._processes(title), what)
        os.kill(process, signal.SIGKILL)
        return f"{what} (process {process})"

    async def _ingress(self) -> str:
        """One that carries calls: after the first death everybody is at the other one, and the next would hit nobody.
        Asked for its calls, each answers for itself, and which one answers is the proxy's choice."""
        left = sum(1 for _ in self._homes())
        carried = dict.fromkeys(await self._processes(_INGRESS), -1)  # -1: it has not answered
        for _ in range(_QUESTIONS):
            answer = await self._admin.conversations()
            if int(answer["process"]) in carried:
                carried[int(answer["process"])] = len(answer["data"])
            if -1 not in carried.values():
                break
        unknown = [process for process, calls in carried.items() if calls < 0]
        left -= sum(calls for calls in carried.values() if calls > 0)
        if len(unknown) == 1:
            carried[unknown[0]] = left
        process = self._one([process for process, calls in carried.items() if calls > 0], "ingress with calls")
        os.kill(process, signal.SIGKILL)
        return f"ingress (process {process}), {carried[process]} calls"

    async def _node(self) -> str:
        node, calls = await self._busy_node()
        index = node["index"]
        await self._system.tell("kill", index=index)
        self._later(self._system.tell("add"))  # as an autoscaler would
        return f"node {index} with {len(node['workers'])} workers, {calls}"

    async def _head(self) -> str:
        before = await self._system.tell("nodes")
        workers = len(next(node for node in before if node["head"])["workers"])
        await self._system.tell("kill-head")

        async def return_() -> None:
            await asyncio.sleep(HEAD_AWAY_S)
            await self._system.tell("start-head")

        self._later(return_())
        return f"the head with {workers} workers, away for {HEAD_AWAY_S:g} s"

    async def _drain(self) -> str:
        busy = Counter(self._homes())
        name = self._one(sorted(busy), "replica with calls")
        await self._admin.drain(name)
        return f"replica {name}, {busy[name]} calls"

    async def _scale_down(self) -> str:
        replicas = self._system.layout.nodes
        await self._system.tell("scale", deployment="PersonaPlexReplica", replicas=replicas - 1)

        async def grow_again() -> None:
            await asyncio.sleep(SHRUNK_S)
            await self._system.tell("scale", deployment="PersonaPlexReplica", replicas=replicas)

        self._later(grow_again())
        return f"{replicas} replicas become {replicas - 1}"

    async def _deploy(self) -> str:
        self._later(self._system.deploy())
        return "everything is rolled out anew"

    async def _partition(self) -> str:
        node, calls = await self._busy_node(without=_INGRESS)
        index = node["index"]
        await self._system.tell("freeze", index=index)

        async def thaw() -> None:
            await asyncio.sleep(FROZEN_S)
            await self._system.tell("thaw", index=index)

        self._later(thaw())
        return f"node {index} cut off for {FROZEN_S:g} s, {calls}"

    async def _busy_node(self, without: str | None = None) -> tuple[Node, str]:
        """A node whose replica holds calls, and how many; on which none of `without` runs."""
        nodes = [node for node in await self._system.tell("nodes") if _titled(node, _REPLICA)]
        if without is not None:
            nodes = [node for node in nodes if not _titled(node, without)]
        where = {str(each["replica"]): str(each["node"]) for each in await self._admin.replicas()}
        calls = Counter(where.get(replica) for replica in self._homes())
        busy = [node for node in nodes if calls[node["id"]]]
        node = self._one(busy, "node with calls")
        return node, f"{calls[node['id']]} calls"

    async def _processes(self, title: str) -> list[int]:
        return [process for node in await self._system.tell("nodes") for process in _titled(node, title)]

    def _one(self, found: list[Any], what: str) -> Any:
        if not found:
            raise Missed(f"there is no {what} to strike")
        return self._draw.choice(found)

    def _later(self, work: Awaitable[Any]) -> None:
        async def run() -> None:
            await work

        self._mending.add(asyncio.create_task(run()))


def _titled(node: Node, title: str) -> list[int]:
    """Processes of that title; what an actor is doing may stand behind it, after a dot."""
    return sorted(int(process) for process, shown in node["workers"].items() if shown.split(".")[0] == title)

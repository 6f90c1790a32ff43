"""The system that is to be hurt: a cluster of fake nodes and the server on it, each in processes of its own.

async with System.running(layout) as system:
    system.url                                  where callers dial
    await system.tell("kill", index=2)          see cluster/fake_nodes.py
    await system.deploy()                       roll out again
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from cluster.ports import free_port
from loadtest.chaos.plan import Windows
from loadtest.chaos.pulse import ordinary

ACCELERATOR = "H100"  # only a name here: the engines compute on the CPU, and are placed as they would be with real ones
_START_S = 180.0
_LOOK_S = 0.5
_FRAMES_PER_S = 12.5
_CODEC_POSITIONS_PER_S = 25
_CODEC_LAYERS = 4  # of the demo checkpoint


class SystemBroken(RuntimeError):
    """The system did not start, or an order to it was not carried out: nothing can be said about calls."""


@dataclass(frozen=True)
class Layout:
    """What is started. `context` and `codec_context`: windows of the checkpoint, in frames and in 40 ms."""

    nodes: int = 3
    slots: int = 4
    ingresses: int = 1
    context: int = 200
    codec_context: int = 50
    settings: tuple[tuple[str, str], ...] = ()  # more for the server: PERSONAPLEX_… without the prefix

    @property
    def windows(self) -> Windows:
        return Windows(self.context / _FRAMES_PER_S, _CODEC_LAYERS * self.codec_context / _CODEC_POSITIONS_PER_S)


class System:
    """A running cluster and server. `running` makes one and leaves nothing behind."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout = layout
        self.port = free_port()
        self.address = ""
        self._folder = folder
        self._cluster: asyncio.subprocess.Process | None = None
        self._talking = asyncio.Lock()
        # Where more than one node answers callers, the head is none of them, as a load balancer before real nodes would
        # leave it out: it is to be missed by nobody. All on one machine, so what tells them apart is their port.
        apart = layout.ingresses > 1
        self._head_cpus = ("--head-cpus", "0") if apart else ()
        head_port = free_port() if apart else self.port
        settings = {
            "CHECKPOINT": str(folder / "checkpoint"),
            "DEVICE": "cpu",
            "ACCELERATOR": ACCELERATOR,
            "SLOTS": str(layout.slots),
            "MIN_REPLICAS": str(layout.nodes),
            "MAX_REPLICAS": str(layout.nodes),
            "INGRESSES": str(layout.ingresses),
            "PORT": str(head_port),
            "TRUNK_HOST": "127.0.0.1",
            # Calls that have said everything stay on the line, silent, until what was struck is mended.
            "IDLE_TIMEOUT_S": "600",
            **dict(layout.settings),
        }
        # One thread an actor: three nodes share this machine's cores.
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **{f"PERSONAPLEX_{name}": value for name, value in settings.items()},
            **({"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.port)} if apart else {}),
        }

    @classmethod
    @asynccontextmanager
    async def running(cls, layout: Layout) -> AsyncIterator[System]:
        """Raises SystemBroken if it does not come up."""
        folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        system = cls(layout, folder)
        try:
            await system._start()
            yield system
        finally:
            await system._stop()
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def tell(self, do: str, **details: Any) -> list[dict[str, Any]]:
        """One command to the cluster; the nodes as they are then. Raises SystemBroken."""
        cluster = self._cluster
        assert cluster is not None
        assert cluster.stdin is not None
        async with self._talking:
            cluster.stdin.write(json.dumps({"do": do, **details}).encode() + b"\n")
            await cluster.stdin.drain()
            return await self._answer()

    async def deploy(self) -> None:
        """`personaplex deploy`; returns when everything runs. Raises SystemBroken."""
        await self._run("-m", "serving.cli.main", "deploy", "--prepared-nodes", "--address", self.address)

    async def slots(self) -> int:
        """Slots of all replicas that the router knows; 0 while it does not answer."""
        try:
            async with httpx.AsyncClient(timeout=2.0, verify=False) as http:  # plain HTTP: certificates cost 25 ms
                answer = await http.get(f"{self.url}/readyz")
            return int(answer.json().get("slots", 0))
        except (httpx.HTTPError, ValueError, AttributeError):
            return 0

    async def whole(self, within_s: float) -> bool:
        """Waits until all replicas are there; False if they are not `within_s`."""
        for _ in range(int(within_s / _LOOK_S) + 1):
            if await self.slots() >= self.layout.nodes * self.layout.slots:
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    async def _start(self) -> None:
        layout = self.layout
        said = await self._run("-m", "serving.haproxy", str(self._folder / "haproxy"))
        self._environment |= dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        # Several nodes' HAProxies are on one machine here, and callers reach any of them at one port.
        self._environment["SERVE_SOCKET_REUSE_PORT_ENABLED"] = "1"
        windows = ("--context", str(layout.context), "--codec-context", str(layout.codec_context))
        await self._run("-m", "models.demo_checkpoint", str(self._folder / "checkpoint"), *windows)
        self._cluster = await asyncio.create_subprocess_exec(
            *ordinary(sys.executable, "-m", "cluster.fake_nodes"),
            *("--nodes", str(layout.nodes), "--resource", f"{ACCELERATOR}=1", *self._head_cpus),
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Ctrl-C is ours; the cluster ends when we close its stdin. No session of its own: Linux would weigh it as a
            # group against us (autogroups), and we, who are to hear every frame, waited for seconds for a processor.
            process_group=0,
        )
        await self._answer()
        await self.deploy()
        if not await self.whole(_START_S):
            raise SystemBroken(f"not all replicas were there within {_START_S:.0f} s")

    async def _answer(self) -> list[dict[str, Any]]:
        assert self._cluster is not None
        assert self._cluster.stdout is not None
        line = await self._cluster.stdout.readline()
        if not line:
            raise SystemBroken(f"the cluster ended with exit code {await self._cluster.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SystemBroken(answer["error"])
        self.address = answer["address"] or self.address
        nodes: list[dict[str, Any]] = answer["nodes"]
        return nodes

    async def _run(self, *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *ordinary(sys.executable, *arguments),
            env=self._environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(_START_S):
                said, _ = await process.communicate()
        except TimeoutError:
            raise SystemBroken(f"{' '.join(arguments)} took longer than {_START_S:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise SystemBroken(f"{' '.join(arguments)} failed:\n{said.decode(errors='replace')[-3000:]}")
        return said.decode(errors="replace")

    async def _stop(self) -> None:
        if self._cluster is None:
            return
        assert self._cluster.stdin is not None
        self._cluster.stdin.close()
        try:
            async with asyncio.timeout(60):
                await self._cluster.wait()
        except TimeoutError:
            self._cluster.kill()
            await self._cluster.wait()

"""Several Ray nodes on one machine, and ways to break them: `python -m cluster.fake_nodes --nodes 3 --resource H100=1`.

A head without accelerators and some workers, all by ray.cluster_utils. What goes wrong with real machines is done to
their processes: SIGKILL to everything of a node, SIGSTOP to what a partition cuts off. Commands are JSON lines on
stdin, answers JSON lines on stdout; the end of stdin stops it all.

    {"do": "nodes"}                     → {"address": …, "nodes": [{"index", "id", "head", "workers": {pid: title}}, …]}
    {"do": "add"}                       a worker like the others
    {"do": "kill", "index": 1}          every process of that worker, at once
    {"do": "freeze" | "thaw", "index"}  none of them runs, connections stay open: what a partition looks like
    {"do": "kill-head"}, {"do": "start-head"}   the whole head; back at the same address over the same GCS storage
    {"do": "scale", "deployment": "PersonaPlexReplica", "replicas": 2}  Serve's own scaling; it picks the victim

The GCS keeps its tables in RocksDB (alpha in Ray 2.60), so that a head can come back; Redis is the established way.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cluster.ports import free_port

APPLICATION = "personaplex"
CPUS_A_NODE = 4
OBJECT_STORE_BYTES = 80 << 20  # the least Ray takes is 75 MiB; everything that matters travels inline


class FakeNodes:
    """A ray.cluster_utils.Cluster whose nodes can be broken. Call from one thread."""

    def __init__(self, workers: int, resources: dict[str, float], head_cpus: int = CPUS_A_NODE) -> None:
        """`head_cpus` 0 keeps Serve's deployments off the head, as Ray advises where the head must not matter."""
        from ray.cluster_utils import Cluster

        self._resources = resources
        self._head_cpus = head_cpus
        self._port = free_port()
        self._cluster = Cluster()
        self._workers: list[Any] = []  # None where one was killed: an index stays what it was
        self.start_head()
        for _ in range(workers):
            self.add()

    def start_head(self) -> None:
        self._cluster.add_node(
            num_cpus=self._head_cpus,
            gcs_server_port=self._port,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )

    def add(self) -> None:
        node = self._cluster.add_node(
            num_cpus=CPUS_A_NODE, resources=self._resources, object_store_memory=OBJECT_STORE_BYTES
        )
        self._workers.append(node)

    def kill(self, index: int) -> None:
        node = self._worker(index)
        self._workers[index - 1] = None
        self._kill(node)
        self._cluster.worker_nodes.discard(node)

    def kill_head(self) -> None:
        node, self._cluster.head_node = self._cluster.head_node, None
        self._kill(node)

    def freeze(self, index: int) -> None:
        _signal(self._processes(self._worker(index)), signal.SIGSTOP)

    def thaw(self, index: int) -> None:
        _signal(self._processes(self._worker(index)), signal.SIGCONT)

    def scale(self, deployment: str, replicas: int) -> None:
        """As Serve's autoscaler would: the controller chooses who goes."""
        import ray
        from ray.serve._private.common import DeploymentID
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        if not ray.is_initialized():
            ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        target = DeploymentID(name=deployment, app_name=APPLICATION)
        ray.get(controller.update_deployment_replicas.remote(target, replicas), timeout=30)

    def nodes(self) -> dict[str, Any]:
        known = [(0, self._cluster.head_node)] if self._cluster.head_node else []
        known += [(index, node) for index, node in enumerate(self._workers, 1) if node is not None]
        return {
            "address": f"127.0.0.1:{self._port}" if not known else self._cluster.address or "",
            "nodes": [
                {"index": index, "id": node.node_id, "head": index == 0, "workers": self._titles(node)}
                for index, node in known
            ],
        }

    def stop(self) -> None:
        import ray

        ray.shutdown()
        for node in [self._cluster.head_node, *self._workers]:
            if node is not None:
                self._kill(node)

    def _worker(self, index: int) -> Any:
        node = self._workers[index - 1] if 0 < index <= len(self._workers) else None
        if node is None:
            raise ValueError(f"there is no worker {index}")
        return node

    def _kill(self, node: Any) -> None:
        """All at once: what a raylet's death would only tell its workers a second later is no machine's death."""
        _signal(self._processes(node), signal.SIGKILL)
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)  # buries them

    def _titles(self, node: Any) -> dict[int, str]:
        """Ray's workers of a node, e.g. {4711: "ray::EngineShell"}."""
        titles = {}
        for process in self._processes(node):
            try:
                title = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
            except OSError:
                continue  # gone while we looked
            if title.startswith("ray::"):
                titles[process] = title
        return titles

    def _processes(self, node: Any) -> list[int]:
        started = [info.process.pid for kind in node.all_processes.values() for info in kind]
        return family(started)


def family(roots: Iterable[int]) -> list[int]:
    """The processes and all their descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue  # gone while we looked
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    left = list(roots)
    while left:
        process = left.pop()
        found.append(process)
        left += children.get(process, [])
    return found


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def obey(nodes: FakeNodes, command: dict[str, Any]) -> dict[str, Any]:
    """Carries out one command. Raises ValueError for one that is none."""
    index = int(command.get("index", 0))
    actions: dict[str, Callable[[], object]] = {
        "nodes": lambda: None,
        "add": nodes.add,
        "kill": lambda: nodes.kill(index),
        "freeze": lambda: nodes.freeze(index),
        "thaw": lambda: nodes.thaw(index),
        "kill-head": nodes.kill_head,
        "start-head": nodes.start_head,
        "scale": lambda: nodes.scale(str(command["deployment"]), int(command["replicas"])),
    }
    action = actions.get(str(command.get("do")))
    if action is None:
        raise ValueError(f"{command.get('do')!r} is no command; there are {', '.join(actions)}")
    action()
    return nodes.nodes()


def _environment(folder: Path) -> dict[str, str]:
    return {
        "RAY_TMPDIR": str(folder),  # sessions and the address file: other clusters on this machine have theirs
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "gcs"),
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, default=3, help="workers beside the head")
    parser.add_argument("--resource", action="append", default=[], metavar="NAME=AMOUNT", help="what each worker has")
    parser.add_argument("--head-cpus", type=int, default=CPUS_A_NODE, help="0: none of Serve's deployments lives there")
    arguments = parser.parse_args()
    resources = {name: float(amount) for name, _, amount in (each.partition("=") for each in arguments.resource)}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever Ray prints is no answer
    folder = Path(tempfile.mkdtemp(prefix="pp-"))  # short: a Unix socket's path has 107 bytes
    (folder / "gcs").mkdir()
    for name, value in _environment(folder).items():
        os.environ.setdefault(name, value)  # whoever set it knows why
    nodes = FakeNodes(arguments.nodes, resources, arguments.head_cpus)
    try:
        print(json.dumps(nodes.nodes()), file=answers)
        for line in sys.stdin:
            try:
                answer = obey(nodes, json.loads(line))
            except Exception as error:  # noqa: BLE001 - whoever asked decides what a failed command means
                # Ray's errors carry whole tracebacks; their last line says what it was.
                answer = {"error": f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"}
            print(json.dumps(answer), file=answers)
    finally:
        nodes.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

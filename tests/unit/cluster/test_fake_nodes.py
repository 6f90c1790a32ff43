"""Commands to the fake cluster, on fakes: what Ray does with them is for the chaos runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fake_nodes import FakeNodes, family, obey


class Recorder:
    def __init__(self) -> None:
        self.done: list[tuple[object, ...]] = []

    def nodes(self) -> dict[str, Any]:
        return {"nodes": []}

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.done.append((name, *arguments))


def test_every_command_reaches_what_it_is_for() -> None:
    nodes = Recorder()
    commands: list[dict[str, Any]] = [
        {"do": "nodes"},
        {"do": "add"},
        {"do": "kill", "index": 2},
        {"do": "freeze", "index": 1},
        {"do": "thaw", "index": 1},
        {"do": "kill-head"},
        {"do": "start-head"},
        {"do": "scale", "deployment": "PersonaPlexReplica", "replicas": 2},
    ]
    for command in commands:
        assert obey(nodes, command) == {"nodes": []}  # type: ignore[arg-type]
    assert nodes.done == [
        ("add",), ("kill", 2), ("freeze", 1), ("thaw", 1), ("kill_head",), ("start_head",),
        ("scale", "PersonaPlexReplica", 2),
    ]  # fmt: skip


def test_what_is_no_command_is_said() -> None:
    with pytest.raises(ValueError, match="'explode' is no command"):
        obey(Recorder(), {"do": "explode"})  # type: ignore[arg-type]


class FakeNode:
    """A node of one process that has a child."""

    def __init__(self) -> None:
        self.child = 0
        code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())
        self.process.stdout.close()
        self.all_processes = {"raylet": [SimpleNamespace(process=self.process)]}
        self.node_id = "id"

    def kill_all_processes(self, **_: object) -> None:
        self.process.wait(30)

    def state(self, process: int) -> str:
        try:
            with open(f"/proc/{process}/stat") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return "gone"


@pytest.fixture
def cluster() -> tuple[FakeNodes, FakeNode]:
    node = FakeNode()
    nodes = FakeNodes.__new__(FakeNodes)
    nodes._cluster = SimpleNamespace(worker_nodes={node}, head_node=None, address=None)
    nodes._workers = [node]
    nodes._port = 1
    return nodes, node


def wait_for(node: FakeNode, process: int, states: str) -> None:
    for _ in range(1500):
        if node.state(process) in states.split():
            return
        time.sleep(0.02)
    pytest.fail(f"{process} is {node.state(process)}, not {states}")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
class TestBreaking:
    def test_a_node_is_frozen_with_all_its_children_and_thaws(self, cluster: tuple[FakeNodes, FakeNode]) -> None:
        nodes, node = cluster
        assert sorted(family([node.process.pid])) == sorted([node.process.pid, node.child])
        nodes.freeze(1)
        for process in (node.process.pid, node.child):
            wait_for(node, process, "T")
        nodes.thaw(1)
        for process in (node.process.pid, node.child):
            wait_for(node, process, "S R")
        nodes.kill(1)

    def test_a_dead_node_is_gone_with_its_children_and_its_number_is_not_given_again(
        self, cluster: tuple[FakeNodes, FakeNode]
    ) -> None:
        nodes, node = cluster
        nodes.kill(1)
        assert node.process.returncode == -signal.SIGKILL
        wait_for(node, node.child, "gone Z")
        assert nodes.nodes()["nodes"] == []
        with pytest.raises(ValueError, match="no worker 1"):
            nodes.freeze(1)

"""Who is struck, on a system of lists: the right process, beside calls, and a miss is said."""

from __future__ import annotations

import random
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from loadtest.chaos import strikes
from loadtest.chaos.strikes import Missed, Striker


class FakeSystem:
    """A head and two workers; replica `a` with calls is on the first, `b` without on the second."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.deployed = 0
        self.layout = SimpleNamespace(nodes=3)
        replica = "ray::ServeReplica:personaplex:PersonaPlexReplica"
        self.nodes = [
            {"index": 0, "id": "H", "head": True, "workers": {"10": "ray::ServeController", "11": "ray::RouterShell"}},
            {"index": 1, "id": "A", "head": False, "workers": {
                "20": replica, "21": "ray::EngineShell.step", "22": "ray::EncoderShell", "23": "ray::DecoderShell"}},
            {"index": 2, "id": "B", "head": False, "workers": {
                "30": replica, "31": "ray::EngineShell", "32": "ray::ServeReplica:personaplex:Ingress"}},
        ]  # fmt: skip

    async def tell(self, do: str, **details: Any) -> list[dict[str, Any]]:
        if do != "nodes":
            self.told.append((do, details))
        return self.nodes

    async def deploy(self) -> None:
        self.deployed += 1


class FakeAdmin:
    def __init__(self) -> None:
        self.drained: list[str] = []
        self.asked, self.carries = 32, 2  # the ingress that answers, and how many calls it carries

    async def replicas(self) -> list[dict[str, Any]]:
        return [{"replica": "a", "node": "A"}, {"replica": "b", "node": "B"}]

    async def conversations(self) -> dict[str, Any]:
        return {"process": self.asked, "data": [{}] * self.carries}

    async def drain(self, replica: str) -> None:
        self.drained.append(replica)


class Scene:
    def __init__(self, homes: list[str], seed: int = 1) -> None:
        self.system, self.admin = FakeSystem(), FakeAdmin()
        self.admin.carries = len(homes)
        self.striker = Striker(self.system, self.admin, lambda: homes, random.Random(seed))  # type: ignore[arg-type]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(strikes.os, "kill", lambda process, number: found.append((process, number)))
    return found


@pytest.mark.parametrize(
    ("scenario", "victim"),
    [("engine", 21), ("encoder", 22), ("decoder", 23), ("replica", 20), ("ingress", 32), ("router", 11),
     ("controller", 10)],
)  # fmt: skip
async def test_the_process_that_is_meant_dies_and_stands_beside_calls(
    scenario: str, victim: int, killed: list[tuple[int, int]]
) -> None:
    said = await Scene(["a", "a"]).striker.strike(scenario)
    assert killed == [(victim, signal.SIGKILL)]
    assert scenario in said
    if victim in (20, 21, 22, 23):
        assert "2 calls" in said


@pytest.mark.parametrize(
    ("asked", "carries", "victims"), [(32, 0, {33}), (33, 0, {32}), (32, 3, {32}), (32, 2, {32, 33})]
)
async def test_an_ingress_that_carries_calls_dies_whichever_of_them_answers(
    asked: int, carries: int, victims: set[int], killed: list[tuple[int, int]]
) -> None:
    for seed in range(10):
        scene = Scene(["a", "b", "a"], seed)
        scene.system.nodes[1]["workers"]["33"] = "ray::ServeReplica:personaplex:Ingress.handle_request"  # type: ignore[index]
        scene.admin.asked, scene.admin.carries = asked, carries
        said = await scene.striker.strike("ingress")
        calls = carries if killed[-1][0] == asked else 3 - carries
        assert said == f"ingress (process {killed[-1][0]}), {calls} calls"
    assert {process for process, _ in killed} == victims


async def test_without_calls_there_is_nothing_to_show(killed: list[tuple[int, int]]) -> None:
    for scenario in ("engine", "replica", "node", "ingress", "drain", "partition"):
        with pytest.raises(Missed):
            await Scene([]).striker.strike(scenario)
    assert killed == []


async def test_a_dead_node_is_replaced() -> None:
    scene = Scene(["a"])
    await scene.striker.strike("node")
    await scene.striker.mended()
    assert scene.system.told == [("kill", {"index": 1}), ("add", {})]


async def test_a_partition_spares_the_ingress_and_heals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes, "FROZEN_S", 0.0)
    scene = Scene(["a", "b", "b", "b"])
    await scene.striker.strike("partition")
    await scene.striker.mended()
    assert scene.system.told == [("freeze", {"index": 1}), ("thaw", {"index": 1})]


async def test_the_head_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes, "HEAD_AWAY_S", 0.0)
    scene = Scene(["a"])
    assert "2 workers" in await scene.striker.strike("head")
    await scene.striker.mended()
    assert [do for do, _ in scene.system.told] == ["kill-head", "start-head"]


async def test_planned_moves() -> None:
    scene = Scene(["a", "b", "a"])
    await scene.striker.strike("drain")
    assert scene.admin.drained in (["a"], ["b"])
    await scene.striker.strike("deploy")
    await scene.striker.mended()
    assert scene.system.deployed == 1


async def test_one_replica_less_and_then_as_many_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strikes, "SHRUNK_S", 0.0)
    scene = Scene(["a"])
    await scene.striker.strike("scale-down")
    await scene.striker.mended()
    assert [details["replicas"] for _, details in scene.system.told] == [2, 3]


async def test_what_cannot_be_mended_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(["a"])

    async def broken() -> None:
        raise RuntimeError("the deployment failed")

    monkeypatch.setattr(scene.system, "deploy", broken)
    await scene.striker.strike("deploy")
    with pytest.raises(RuntimeError, match="the deployment failed"):
        await scene.striker.mended()

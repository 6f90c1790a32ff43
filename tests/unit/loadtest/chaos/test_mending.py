"""When the next strike may come: what it takes fits elsewhere, and no call has slot and journal on one machine."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import httpx
import pytest

from loadtest.chaos.journals import AdminClient, Seen
from loadtest.chaos.mending import has_room, until_survivable
from loadtest.chaos.strikes import Missed
from loadtest.chaos.system import System

CALLS = 8


def replica(busy: int = 0, free: int = 0, **more: Any) -> dict[str, Any]:
    return {"busy": busy, "free": free, "arriving": 0, "heard_ms": 300.0, "draining": False, **more}


class Scene:
    """Three nodes with a replica of four slots each, eight calls on two of them."""

    def __init__(self) -> None:
        self.replicas_now = [replica(busy=4), replica(busy=4), replica(free=4)]
        self.seen = [Seen() for _ in range(CALLS)]
        self.said: list[str] = []
        self.all_there, self.away = True, False

    async def whole(self, within_s: float) -> bool:
        return self.all_there

    async def replicas(self) -> list[dict[str, Any]]:
        if self.away:
            raise httpx.ConnectError("nobody there")
        return self.replicas_now

    async def wait(self, kind: str, within_s: float = 300.0) -> None:
        system, admin = cast(System, self), cast(AdminClient, self)
        await until_survivable(system, admin, kind, self.seen, time.monotonic() + within_s, self.said.append)


def view(**more: Any) -> dict[str, Any]:
    return {"epoch": 1, "replica": "r", "numerics_id": "n", "next_frame": 3, "frames": [], **more}


def test_what_another_ingress_shows_does_not_say_where_the_journal_is() -> None:
    seen = Seen()
    seen.add(view(apart=False))
    seen.add(view())
    assert not seen.apart
    seen.add(view(apart=True))
    assert seen.apart


@pytest.mark.parametrize(
    ("replicas", "room"),
    [
        ([replica(busy=4), replica(busy=4), replica(free=4)], True),
        ([replica(busy=4), replica(busy=4)], False),  # eight calls, and the third is not back yet
        ([replica(busy=3, free=1), replica(free=4)], True),  # three calls need no third
        ([replica(busy=3, free=1)], False),
        ([replica(busy=3, free=1), replica(free=4, heard_ms=2_000.0)], False),  # dead, and not missed yet
        ([replica(busy=3, free=1), replica(free=4, draining=True)], False),
        ([replica(busy=2, arriving=1, free=1), replica(busy=1, free=2)], False),  # those that come fall with it
        ([replica(free=4), replica(free=4)], False),  # nobody is there to be struck
    ],
)
def test_any_victims_calls_have_to_fit_elsewhere(replicas: list[dict[str, Any]], room: bool) -> None:
    assert has_room(replicas) is room


@pytest.mark.parametrize("kind", ["engine", "encoder", "decoder", "replica", "node", "partition"])
async def test_what_takes_calls_comes_as_soon_as_there_is_room_for_them(kind: str) -> None:
    scene = Scene()
    scene.all_there = False  # it is still being replaced, and not needed
    scene.replicas_now = [replica(busy=4), replica(busy=4)]
    waiting = asyncio.create_task(scene.wait(kind))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    scene.replicas_now = [replica(busy=4), replica(busy=4), replica(free=4)]
    await asyncio.wait_for(waiting, 30)


@pytest.mark.parametrize("kind", ["router", "controller", "head", "ingress", "drain", "scale-down", "deploy"])
async def test_all_others_come_when_everything_is_back(kind: str) -> None:
    scene = Scene()
    scene.all_there = False
    with pytest.raises(Missed, match="not replaced"):
        await scene.wait(kind, 0.0)
    scene.all_there = True
    await scene.wait(kind)


async def test_a_node_is_struck_when_every_call_is_apart() -> None:
    scene = Scene()
    scene.seen[1].apart = False
    await scene.wait("replica")  # which takes slots alone
    waiting = asyncio.create_task(scene.wait("node"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert scene.said == ["the next strike waits: some calls still had slot and journal on one node"]
    scene.seen[1].apart = True
    await asyncio.wait_for(waiting, 30)


async def test_what_was_lacking_is_said() -> None:
    scene = Scene()
    scene.seen[0].apart = False
    with pytest.raises(Missed, match="on one node"):
        await scene.wait("node", 0.0)
    scene.replicas_now = [replica(busy=4), replica(busy=4)]
    with pytest.raises(Missed, match="nowhere to go"):
        await scene.wait("engine", 0.0)
    scene.away = True
    with pytest.raises(Missed, match="nobody said"):
        await scene.wait("engine", 0.0)

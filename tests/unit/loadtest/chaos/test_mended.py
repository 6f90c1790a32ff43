"""When the next strike may come: all slots there, and no call whose slot and journal are on one machine."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from loadtest.chaos.journals import Seen
from loadtest.chaos.run import _until_mended
from loadtest.chaos.strikes import Missed
from loadtest.chaos.system import System


class FakeSystem:
    def __init__(self, whole: bool = True) -> None:
        self._whole = whole

    async def whole(self, within_s: float) -> bool:
        return self._whole


def system(whole: bool = True) -> System:
    return cast(System, FakeSystem(whole))


def view(**more: Any) -> dict[str, Any]:
    return {"epoch": 1, "replica": "r", "numerics_id": "n", "next_frame": 3, "frames": [], **more}


def test_what_another_ingress_shows_does_not_say_where_the_journal_is() -> None:
    seen = Seen()
    seen.add(view(apart=False))
    seen.add(view())
    assert not seen.apart
    seen.add(view(apart=True))
    assert seen.apart


async def test_a_node_is_struck_when_every_call_is_apart() -> None:
    seen = [Seen(), Seen(apart=False)]
    waiting = asyncio.create_task(_until_mended(system(), "node", seen, time.monotonic() + 300.0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    seen[1].apart = True
    await asyncio.wait_for(waiting, 30)


async def test_other_strikes_do_not_take_both_and_wait_for_slots_alone() -> None:
    await asyncio.wait_for(_until_mended(system(), "replica", [Seen(apart=False)], time.monotonic() + 300.0), 30)


async def test_what_is_not_mended_in_time_is_a_strike_missed() -> None:
    with pytest.raises(Missed, match="not replaced"):
        await _until_mended(system(whole=False), "engine", [Seen()], time.monotonic())
    with pytest.raises(Missed, match="on one node"):
        await _until_mended(system(), "node", [Seen(apart=False)], time.monotonic())

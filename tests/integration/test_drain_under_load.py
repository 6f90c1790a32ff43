"""Thirty calls on three replicas, one of them drained while all talk: nobody else may notice.

Late is what a player with 120 ms in hand would have run dry for (loadtest.playout). The calls of the replica that is
drained move, and are judged by `loadtest.chaos drain`; here they only must not be lost.

Thirty calls of the demo checkpoint on three replicas are more than two cores carry undisturbed. So the model is a small
one of the same form, which costs next to nothing; everything else, thirty times over, is what is served.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from loadtest.chaos.pulse import Pulse, wake_as_before, wake_first
from loadtest.playout import underruns
from tests.real_server import FRAME_S, Caller, call, serve
from tests.small_checkpoint import write_small_checkpoint

CALLS, REPLICAS, SLOTS = 30, 3, 16  # a reserve of one replica is kept, so two have to hold them all
SETTLED_S, DRAIN_S, SECONDS = 3.0, 12.0, 32.0  # after everybody was ready: judged from, drained at, hung up at
RAMP_S = 0.1


@dataclass
class Run:
    """What was heard: each call's late frames before the drain and from it on, and its longest gap from then on."""

    drained: list[int] = field(default_factory=list)  # the calls that had to move
    late_before: list[int] = field(default_factory=list)
    late_after: list[int] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # frames that were not answered
    late_s: list[float] = field(default_factory=list)  # when frames of calls that had not to move were late
    asleep: list[tuple[float, float]] = field(default_factory=list)  # when this process was, and for how long
    gone_s: float | None = None  # how long the replica was to be seen after it was drained

    def __str__(self) -> str:
        others = [i for i in range(len(self.gap_s)) if i not in self.drained]
        return (
            f"{len(self.drained)} of {len(self.gap_s)} calls had to move, longest gap of theirs "
            f"{max((self.gap_s[i] for i in self.drained), default=0):.3f} s; of the others "
            f"{max(self.gap_s[i] for i in others):.3f} s, late frames {sum(self.late_after[i] for i in others)}, "
            f"{max(self.late_after[i] for i in others)} a call at most; before the drain {sum(self.late_before)}; "
            f"the replica was gone after {self.gone_s and round(self.gone_s, 1)} s; "
            f"late, in seconds after the drain: {sorted({round(each, 1) for each in self.late_s})}; "
            f"this process asleep: {[(round(at_s, 1), round(for_s, 3)) for at_s, for_s in self.asleep]}"
        )


async def talk(url: str, calls: int, seconds: float, drain_s: float) -> Run:
    """Everybody talks for `seconds`; after `drain_s` of them the replica with the most calls is drained."""
    run = Run()
    frames = round(seconds / FRAME_S)
    async with AsyncExitStack() as lines, httpx.AsyncClient(base_url=url, timeout=10) as admin:
        callers: list[Caller] = []
        for seed in range(calls):
            callers.append(await lines.enter_async_context(call(url, seed=seed)))
            await asyncio.sleep(RAMP_S)
        await asyncio.gather(*(caller.ready() for caller in callers))
        before, pulse = os.getpriority(os.PRIO_PROCESS, 0), Pulse()
        wake_first()  # thirty calls' clock, on the cores that it measures
        lines.callback(wake_as_before, before)
        beating = asyncio.create_task(pulse.beat())
        start_s = time.monotonic()
        talking = [asyncio.create_task(caller.speak(frames)) for caller in callers]
        await asyncio.sleep(drain_s)
        held = {each["session"]: each["replica"] for each in (await admin.get("/admin/conversations")).json()["data"]}
        homes = [held[caller.metadata["session"]] for caller in callers]
        victim = max(sorted(set(homes)), key=homes.count)
        run.drained = [i for i, home in enumerate(homes) if home == victim]
        struck_s = time.monotonic()
        (await admin.post(f"/admin/replicas/{victim}/drain")).raise_for_status()
        while run.gone_s is None and time.monotonic() < start_s + seconds:
            await asyncio.sleep(0.5)
            left = {each["replica"] for each in (await admin.get("/admin/replicas")).json()["data"]}
            run.gone_s = time.monotonic() - struck_s if victim not in left else None
        await asyncio.gather(*talking, return_exceptions=True)
        beating.cancel()
    run.asleep = [(each.from_s - struck_s, each.seconds) for each in pulse.stalls]
    for i, caller in enumerate(callers):
        heard_s = caller.arrivals_s
        late_s = [heard_s[frame] for frame in underruns(heard_s)]
        run.late_before.append(sum(start_s + SETTLED_S <= each < struck_s for each in late_s))
        run.late_after.append(sum(each >= struck_s for each in late_s))
        run.late_s += [each - struck_s for each in late_s if each >= struck_s and i not in run.drained]
        run.gap_s.append(max(b - a for a, b in pairwise(heard_s) if b >= struck_s))
        run.lost.append(frames - len(caller.audio))
    return run


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_drain_under_thirty_calls_costs_no_other_call_more_than_one_late_frame(tmp_path: Path) -> None:
    checkpoint = write_small_checkpoint(tmp_path)
    with serve(checkpoint=checkpoint, slots=SLOTS, min_replicas=REPLICAS, max_replicas=REPLICAS, device="cpu") as url:
        run = asyncio.run(talk(url, CALLS, SECONDS, DRAIN_S))
    print(run)
    assert sum(run.lost) == 0, run
    assert run.drained
    assert len(run.drained) < CALLS
    assert sum(run.late_before) == 0, f"this machine does not carry so many calls even undisturbed: {run}"
    assert max(run.late_after[i] for i in range(CALLS) if i not in run.drained) <= 1, run
    assert run.gone_s is not None, run
    assert run.gone_s <= 10.0, run

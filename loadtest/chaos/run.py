"""One scenario from beginning to end: calls, strikes, journals, verdict.

all callers dial ─ all are ready ─┬─ strikes at their times ─────────────┐
                                  ├─ journals are looked at all the time ├─ last look ─ hang up ─ verdict
                                  └─ each says its frames, hears answers ┘
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import httpx

from loadtest.callers import CALLERS
from loadtest.chaos.call_verdict import Reference, judge_call
from loadtest.chaos.caller import GRACE_S, Caller, CallLog
from loadtest.chaos.gaps import gaps
from loadtest.chaos.journals import AdminClient, Seen, look_until, watch
from loadtest.chaos.mending import until_survivable
from loadtest.chaos.plain import PlainCaller
from loadtest.chaos.plan import RECOVERY_S, STRIKES, gap_limit_s, kinds, spread, strike_times_s
from loadtest.chaos.pulse import Pulse, longest_s, wake_first
from loadtest.chaos.strikes import Striker
from loadtest.chaos.system import System, SystemBroken
from loadtest.chaos.verdict import Verdict, struck_at
from loadtest.speech import FRAME_S

ROLE = "You enjoy having a good conversation."
FIRST_SEED = 4_000
_RAMP_S = 0.15  # between two callers' dialling
_READY_S = 120.0
_EXTRA_S = 1.0  # whatever is sent beyond the last frame comes within this
_JOURNAL_S = 10.0
_EMPTY_S, _LOOK_S = 10.0, 0.25
# Three rollouts of three replicas, one at a time, each loading beside eight calls on two cores.
_MENDED_S = 300.0
_ROOM_S = 40.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Conversations:
    """What a run of calls left behind, in the callers' order, and how well we were awake meanwhile."""

    logs: Sequence[CallLog]
    seen: Sequence[Seen]
    pulse: Pulse

    @property
    def kept(self) -> bool:
        return all(log.failure is None for log in self.logs)

    @property
    def longest_gap_s(self) -> float:
        return max((gap.seconds for log in self.logs for gap in gaps(log)), default=0.0)


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    sessions: int = 8
    seconds: float = 60.0
    seed: int = 1
    strikes: int = STRIKES

    @property
    def frames(self) -> int:
        return round(self.seconds / FRAME_S)


async def undisturbed(system: System, order: Order, say: Say) -> Conversations:
    """The same conversations with nobody in their way."""
    say(f"{order.sessions} undisturbed conversations of {order.seconds:g} s, as a reference")
    async with _talking(system, order) as talk:
        return await _to_the_end(talk, order, _nothing())


async def struck(
    system: System, scenario: str, order: Order, references: Sequence[Reference], quiet_gap_s: float, say: Say
) -> tuple[Verdict, Conversations]:
    """The conversations while the scenario strikes, held against their references."""
    times_s = strike_times_s(order.seconds, order.seed, system.layout.windows, order.strikes)
    say(f"{scenario}: strikes after {spread(times_s)} s")
    done: list[tuple[float, str]] = []  # when, on our clock, and what
    missed: list[str] = []
    leaks: list[str] = []
    async with _talking(system, order, plain="ingress" in kinds(scenario)) as talk:
        striker = Striker(system, talk.admin, lambda: _homes(talk.seen), random.Random(order.seed))
        start_s = time.monotonic()

        async def strike() -> None:
            try:
                former = ""
                free_s = start_s  # from when on a strike may follow the last one, should that have been late
                for due_s, kind in zip(times_s, cycle(kinds(scenario)), strict=False):
                    await asyncio.sleep(max(start_s + due_s, free_s) - time.monotonic())
                    if (former, kind) != ("deploy", "deploy"):  # one on top of another still replaces one at a time
                        until_s = start_s + order.seconds - 1.0
                        await until_survivable(system, talk.admin, kind, talk.seen, until_s, say)
                    former = kind
                    now_s = time.monotonic()
                    free_s = now_s + RECOVERY_S
                    what = await striker.strike(kind)
                    done.append((now_s, what))
                    say(f"{now_s - start_s:.1f} s: {what}")
            except Exception as error:  # noqa: BLE001 - a strike that went wrong is a fault of the run, and is said
                missed.append(f"a strike was missed: {type(error).__name__}: {error}")

        conversations = await _to_the_end(talk, order, strike())
        try:
            async with asyncio.timeout(_MENDED_S):
                await striker.mended()
        except Exception as error:  # noqa: BLE001 - as above
            missed.append(f"what was struck was not mended: {type(error).__name__}: {error}")
        if conversations.kept:
            talking = order.sessions + sum(each.up.is_set() for each in talk.plain)
            leaks += await leaked(talk.admin, talking, f"by {talking} calls")
    if conversations.kept:
        leaks += await leaked(AdminClient(system.url), 0, "when everybody had hung up")
    logs, stalls = conversations.logs, conversations.pulse.stalls
    calls = [
        judge_call(log, each, reference, order.frames, stalls)
        for log, each, reference in zip(logs, conversations.seen, references, strict=True)
    ]
    verdict = Verdict(
        scenario=scenario,
        calls=calls,
        gap_limit_s=gap_limit_s(scenario, order.sessions),
        strikes=[struck_at(start_s, at_s, what, logs, stalls) for at_s, what in done],
        missed="; ".join(missed),
        leaks=leaks,
        redials=[redial for each in talk.plain for redial in each.redials] if talk.plain else None,
        witness_lag_ms=conversations.pulse.p99_ms,
        witness_asleep_s=longest_s(stalls),
        undisturbed_gap_s=quiet_gap_s,
        expected_strikes=order.strikes,
    )
    return verdict, conversations


@dataclass
class _Talk:
    """Calls that go on."""

    callers: Sequence[Caller]
    seen: Sequence[Seen]
    plain: Sequence[PlainCaller]
    admin: AdminClient
    pulse: Pulse


@asynccontextmanager
async def _talking(system: System, order: Order, *, plain: bool = False) -> AsyncIterator[_Talk]:
    """Callers that have been answered, and who looks at their journals, for a block; at its end they hang up. With
    `plain` one more talks beside them, who knows of no tokens."""
    admin = AdminClient(system.url)
    callers = [
        Caller(system.url, call, FIRST_SEED + call, CALLERS[call % len(CALLERS)].speech(), order.frames, ROLE)
        for call in range(order.sessions)
    ]
    speech = CALLERS[0].speech() if plain else None  # before anybody talks: reading it takes half a second
    tasks: list[asyncio.Task[None]] = []
    try:
        await _until_room(admin, system.layout.nodes * system.layout.slots)
        for caller in callers:
            tasks.append(asyncio.create_task(caller.hold()))
            await asyncio.sleep(_RAMP_S)
        for _ in range(int(_READY_S / _RAMP_S)):
            if all(caller.log.ready_s is not None or caller.over.is_set() for caller in callers):
                break
            await asyncio.sleep(_RAMP_S)
        others = []
        if speech is not None:
            others.append(PlainCaller(system.url, FIRST_SEED - 1, speech, ROLE, rooms=admin.rooms))
        for other in others:
            tasks.append(asyncio.create_task(other.hold()))
            async with asyncio.timeout(_READY_S):
                await other.up.wait()
        seen = [Seen() for _ in callers]
        sessions = {caller.log.session: each for caller, each in zip(callers, seen, strict=True)}
        wake_first()
        pulse = Pulse()
        tasks += [asyncio.create_task(watch(admin, sessions)), asyncio.create_task(pulse.beat())]
        yield _Talk(callers, seen, others, admin, pulse)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await admin.close()


async def _to_the_end(talk: _Talk, order: Order, strikes: Awaitable[None]) -> Conversations:
    """Until every call has been answered in full or has failed, and its journal was seen to the last frame."""
    striking = asyncio.ensure_future(strikes)
    try:
        async with asyncio.timeout(order.seconds + GRACE_S):
            await asyncio.gather(*(caller.over.wait() for caller in talk.callers))
    except TimeoutError:
        for caller in talk.callers:
            if not caller.over.is_set():
                caller.log.failure = f"{len(caller.log.heard)} of {order.frames} frames were answered"
    striking.cancel()
    await asyncio.gather(striking, return_exceptions=True)
    await asyncio.sleep(_EXTRA_S)
    await asyncio.gather(
        *(
            look_until(talk.admin, caller.log.session, each, order.frames, _JOURNAL_S)
            for caller, each in zip(talk.callers, talk.seen, strict=True)
            if caller.log.failure is None
        )
    )
    return Conversations([caller.log for caller in talk.callers], talk.seen, talk.pulse)


async def _until_room(admin: AdminClient, slots: int) -> None:
    """Replicas that were late take nobody for some seconds: those who talked before are not to be in the way."""
    free = 0
    for _ in range(int(_ROOM_S / _LOOK_S)):
        try:
            free = sum(int(each["free"]) for each in await admin.replicas())
        except httpx.HTTPError:
            free = 0
        if free == slots:
            return
        await asyncio.sleep(_LOOK_S)
    raise SystemBroken(f"{free} of {slots} slots were free after {_ROOM_S:g} s in which nobody talked")


async def leaked(admin: AdminClient, talking: int, when: str) -> list[str]:
    """Whether the router knows of other slots in use than there are calls, for longer than a move takes."""
    held = -1
    for _ in range(int(_EMPTY_S / _LOOK_S)):
        try:
            held = sum(int(each["busy"]) + int(each["arriving"]) for each in await admin.replicas())
        except httpx.HTTPError:
            held = -1
        if held == talking:
            return []
        await asyncio.sleep(_LOOK_S)
    return [f"{held} slots were held {when}" if held >= 0 else f"nobody could say which slots were held {when}"]


async def _nothing() -> None:
    return


def _homes(seen: Sequence[Seen]) -> list[str]:
    return [each.homes[-1][1] for each in seen if each.homes]


def save(path: Path, conversations: Conversations) -> None:
    """Keeps a reference for later runs of the same seeds, roles and checkpoint."""
    references = [
        Reference.of(log, seen).as_json() for log, seen in zip(conversations.logs, conversations.seen, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gap_s": conversations.longest_gap_s, "calls": references}))


def write_log(path: Path, conversations: Conversations) -> None:
    """All that the callers saw, for whoever looks for the cause of a fault. Times are of one monotonic clock."""
    calls = [
        {
            "call": log.call,
            "session": log.session,
            "ready_s": log.ready_s,
            "failure": log.failure,
            "homes": seen.homes,
            "cuts": log.cuts,
            "told_s": log.told_s,
            "heard": [(heard.frame, round(heard.at_s, 3), heard.digest) for heard in log.heard],
            "tokens": list(seen.tokens.items()),
            "metadata": log.metadata,
        }
        for log, seen in zip(conversations.logs, conversations.seen, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    asleep = [(stall.from_s, stall.until_s) for stall in conversations.pulse.stalls]
    path.write_text(json.dumps({"calls": calls, "asleep": asleep}))


def load(path: Path, order: Order) -> tuple[list[Reference], float]:
    """References that `save` wrote. A longer run of more callers will do: a call depends on nobody else's.

    Raises ValueError if it is too short or holds too few.
    """
    kept = json.loads(path.read_text())
    references = [Reference.from_json(each) for each in kept["calls"]][: order.sessions]
    if len(references) < order.sessions or any(len(each.tokens) < order.frames for each in references):
        raise ValueError(f"{path} holds fewer or shorter conversations than are asked for")
    return references, float(kept["gap_s"])

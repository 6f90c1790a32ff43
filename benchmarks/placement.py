"""Microseconds that the session router takes to place a conversation in a large cluster.

    python -m benchmarks.placement
    python -m benchmarks.placement --replicas 200 --slots 64 --sessions 10000 --json

The router itself is measured, without Ray: request in, grant out, lease and index kept. "every replica looked at" is
the peer of its index: the choice alone. Others have come and gone, so that most replicas have room.
Budget: 20 µs at p50 for a new caller, with 10,000 sessions on 200 replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from actors.messages import ReplicaReport, SlotReport
from cluster.policy.placement import Spot
from serving.router import SessionRouter
from serving.routing import AcquireRequest, RouterConfig

BUDGET_US = 20.0
PER_NODE = 8  # replicas


@dataclass(frozen=True)
class PlacementRow:
    """One kind of call; microseconds."""

    what: str
    p50_us: float
    p99_us: float


class Bench:
    """A router with a cluster full of live sessions, and a stopwatch."""

    def __init__(self, replicas: int, slots: int, sessions: int) -> None:
        self.router = SessionRouter(RouterConfig(lease_s=1e9, reserve_slots=None, settle_s=0.0))
        self.replicas = [f"replica-{i:04d}" for i in range(replicas)]
        self.sessions = [f"session-{i:05d}" for i in range(sessions)]
        self.slots = slots
        self.taken: defaultdict[str, list[float]] = defaultdict(list)
        self._random = random.Random(1)
        self._next = sessions

    async def fill(self) -> None:
        """Every session gets a slot, and every replica reports what it holds as live; gaps are left among them."""
        for name in self.replicas:
            self.router.report(self._report(name, ()))
        room = (len(self.replicas) - 1) * self.slots - len(self.sessions)
        passing = [f"passing-{i}" for i in range(min(room, len(self.sessions)))]
        everybody = self.sessions + passing
        self._random.shuffle(everybody)
        held: defaultdict[str, list[str]] = defaultdict(list)
        for session in everybody:
            held[(await self.router.acquire(self._request(session))).replica].append(session)
        for session in passing:
            self.router.release(session, 1, "ingress", opened=False)
        for name in self.replicas:
            report = self._report(name, [session for session in held[name] if not session.startswith("passing")])
            for what in ("report, all of it new", "report, as before"):
                start = time.perf_counter_ns()
                self.router.report(report)
                self._note(what, start)

    async def turn(self) -> None:
        """One caller comes and goes, one conversation moves and moves back, so that the state stays as it was."""
        caller = self._request(f"session-{self._next}")
        self._next += 1
        start = time.perf_counter_ns()
        grant = await self.router.acquire(caller)
        self._note("new caller", start)
        start = time.perf_counter_ns()
        self.router.release(grant.session, grant.epoch, "ingress", opened=False)
        self._note("release", start)

        session = self._random.choice(self.sessions)
        moving = dataclasses.replace(self._request(session), after_epoch=1)
        start = time.perf_counter_ns()
        prepared = await self.router.prepare(moving)
        self._note("move", start)
        self.router.release(session, prepared.epoch, "ingress", opened=False)

    def look_at_all(self, spots: Sequence[Spot]) -> None:
        node = self._node(self._random.choice(self.replicas))
        start = time.perf_counter_ns()
        best: Spot | None = None
        best_key: tuple[bool, int, str] | None = None
        for spot in spots:
            if spot.free > 0 and spot.admitting:
                key = (spot.node == node, spot.free, spot.replica)
                if best_key is None or key < best_key:
                    best, best_key = spot, key
        self._note("every replica looked at", start)
        assert best is not None

    def spots(self) -> list[Spot]:
        return [
            Spot(view.replica, view.node, view.slots, view.free, view.free, view.admitting)
            for view in self.router.replicas()
        ]

    def _note(self, what: str, start_ns: int) -> None:
        self.taken[what].append((time.perf_counter_ns() - start_ns) / 1e3)

    def _node(self, replica: str) -> str:
        return f"node-{int(replica[-4:]) // PER_NODE}"

    def _request(self, session: str) -> AcquireRequest:
        """By an ingress on any of the nodes."""
        return AcquireRequest(session, "tenant", None, "ingress", self._node(self._random.choice(self.replicas)))

    def _report(self, name: str, held: Sequence[str]) -> ReplicaReport:
        busy = tuple(SlotReport(session, 1, "tenant", slot, "ingress") for slot, session in enumerate(held))
        return ReplicaReport(name, self._node(name), f"ws://{name}", self.slots, "numerics", True, busy)


async def measure(replicas: int, slots: int, sessions: int, rounds: int) -> list[PlacementRow]:
    """Every kind of call, `rounds` times among the same sessions."""
    if sessions >= (replicas - 1) * slots:
        raise SystemExit(f"{sessions} sessions leave no reserve on {replicas} replicas of {slots} slots: give fewer")
    bench = Bench(replicas, slots, sessions)
    await bench.fill()
    spots = bench.spots()
    for _ in range(rounds):
        await bench.turn()
        bench.look_at_all(spots)
    return [PlacementRow(what, _quantile(us, 0.5), _quantile(us, 0.99)) for what, us in sorted(bench.taken.items())]


def _quantile(values: Sequence[float], share: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * share))], 2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--slots", type=int, default=64, help="of each replica")
    parser.add_argument("--sessions", type=int, default=10_000, help="alive while it is measured")
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    asked = parser.parse_args(argv)
    rows = asyncio.run(measure(asked.replicas, asked.slots, asked.sessions, asked.rounds))
    if asked.json:
        print(json.dumps({"budget_us": BUDGET_US, "rows": [dataclasses.asdict(row) for row in rows]}))
        return
    print(f"{asked.sessions} sessions on {asked.replicas} replicas of {asked.slots} slots; µs; budget {BUDGET_US:g}")
    for row in rows:
        print(f"{row.what:40} p50 {row.p50_us:8.2f}   p99 {row.p99_us:8.2f}")


if __name__ == "__main__":
    main()

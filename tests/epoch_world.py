"""A cluster whose network is an adversary, for tests/unit/serving/test_epochs.py: who is given which epoch.

The real router, one life after another, and what ingresses really ask with (`Holding`); network and replicas are in
tests/epoch_network.py. Whatever is said may be late: answers are lost, requests are cancelled, what was sent to a
replica or to the router arrives when the adversary likes, in the order of its connection; replicas are cut off;
routers die and forget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.errors import NotYours, ServingError
from actors.messages import ReplicaReport, SlotReport
from serving.holding import Holding, Place
from serving.router import SessionRouter
from serving.routing import Grant, RouterConfig
from serving.tenants import Tenant
from tests.epoch_network import SLOTS, Line, Network, Slots, Talk
from tests.fake_clock import FakeClock, settle

LEASE_S = 3.0
PICK = st.integers(0, 1000)
TENANT = Tenant("t")


class EpochMachine(RuleBasedStateMachine):
    """Picks by number, so that every step means something in every state."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.clock = FakeClock()
        self.lives = 0
        self.network = Network()
        self.replicas = {name: Slots(name) for name in ("r1", "r2", "r3", "r4")}
        self.talks: list[Talk] = []
        self.told: dict[tuple[str, int], tuple[str, Talk]] = {}  # to whom an epoch was given, and where
        self.router_dies()
        self._run(self._pass_s(2.0))

    # ---- what ingresses do ------------------------------------------------------------------------------------

    @rule(ingress=st.sampled_from(["i1", "i2"]))
    def caller_comes(self, ingress: str) -> None:
        talk = self._talk(f"s{len(self.network.highest)}", ingress)
        grant = self._ask(talk, talk.holding.acquire(0.0))
        if grant is not None:
            self.talks.append(talk)
            talk.home = grant
            self._open(talk, grant)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK)
    def begins_to_move(self, pick: int) -> None:
        talk = self._pick(pick)
        if talk.home is None or talk.next is not None:
            return
        talk.next = self._ask(talk, talk.holding.prepare(0.0))
        if talk.next is not None:
            self._open(talk, talk.next)

    @precondition(lambda self: any(talk.next for talk in self.talks))
    @rule(pick=PICK, gives_up=st.booleans())
    def ends_its_move(self, pick: int, gives_up: bool) -> None:
        moving = [talk for talk in self.talks if talk.next]
        talk = moving[pick % len(moving)]
        left = talk.next
        if not gives_up and self._done(talk.holding.commit()):
            left, talk.home = talk.home, talk.next
        else:
            talk.holding.undo(opened=True)
        talk.next = None
        self._close(talk, left)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, unreachable=st.booleans())
    def is_recovered(self, pick: int, unreachable: bool) -> None:
        talk = self._pick(pick)
        talk.holding.undo(opened=True)
        for left in (talk.next, talk.home):
            self._close(talk, left)
        avoid = () if talk.home is None else (talk.home.replica,)
        talk.next = talk.home = None
        talk.home = self._ask(talk, talk.holding.acquire(0.0, avoid, recovery=True, unreachable=unreachable))
        if talk.home is not None:
            self._open(talk, talk.home)

    @precondition(lambda self: self.talks)
    @rule(pick=PICK, ingress=st.sampled_from(["i1", "i2"]), again=st.booleans())
    def is_resumed(self, pick: int, ingress: str, again: bool) -> None:
        """By the token that its ingress gave out last, or by one that may be used up."""
        former = self._pick(pick)
        talk = self._talk(former.holding.session, ingress)
        grant = self._ask(talk, talk.holding.resume(former.holding.serial))
        if grant is None:
            return
        self.talks.append(talk)
        talk.home = grant
        self._open(talk, grant, adopt=True)
        if again:
            talk.holding.unspend()

    @precondition(lambda self: self.talks)
    @rule(pick=PICK)
    def hangs_up(self, pick: int) -> None:
        talk = self._pick(pick)
        self.talks.remove(talk)
        for left in (talk.next, talk.home):
            self._close(talk, left)
        self._run(talk.holding.give_back(opened=True))

    # ---- what the adversary does ------------------------------------------------------------------------------

    @rule(loses=st.sampled_from([False, False, True]), keeps=st.booleans())
    def network_changes(self, loses: bool, keeps: bool) -> None:
        self.network.loses_answers, self.network.keeps = loses, keeps

    @precondition(lambda self: self.network.busy)
    @rule(pick=PICK)
    def something_late_arrives(self, pick: int) -> None:
        busy = self.network.busy
        self.network.deliver(busy[pick % len(busy)], one=True)

    @rule()
    def router_dies(self) -> None:
        self.lives += 1
        config = RouterConfig(lease_s=LEASE_S, settle_s=1.0, rebuilds_at_once=4)
        self.router = SessionRouter(config, self.clock.now, epochs_before=self.lives * 1_000_000)

    @rule(pick=PICK, deaf=st.booleans())
    def replica_is_cut_off(self, pick: int, deaf: bool) -> None:
        self.replicas[f"r{1 + pick % 4}"].deaf = deaf

    @rule(pick=PICK)
    def replica_reports(self, pick: int) -> None:
        self._report(self.replicas[f"r{1 + pick % 4}"])

    @rule(pick=PICK)
    def replica_loses_everything(self, pick: int) -> None:
        self.replicas[f"r{1 + pick % 4}"].held.clear()

    @rule(seconds=st.sampled_from([0.5, 1.0, LEASE_S, 3 * LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self._run(self._pass_s(seconds))

    # ---- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def one_owner_an_epoch(self) -> None:
        if not hasattr(self, "told"):
            return
        for replica in self.replicas.values():
            for session, (epoch, talk) in replica.held.items():
                assert self.told[session, epoch] == (replica.name, talk), "a home that was not given to it"

    def teardown(self) -> None:
        if not hasattr(self, "told"):
            return
        try:
            self._peace()
        finally:
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            self.loop.run_until_complete(_gone(left))
            self.loop.close()

    def _peace(self) -> None:
        self.network.make_peace()
        for replica in self.replicas.values():
            replica.deaf = False
        self._run(self._pass_s(3 * LEASE_S))
        owners: dict[str, Talk] = {}
        for talk in self.talks:
            home = talk.home
            if home is not None and self.replicas[home.replica].held.get(home.session) == (home.epoch, talk):
                assert owners.setdefault(home.session, talk) is talk, "two owners"
        for replica in self.replicas.values():
            for session, (epoch, _) in replica.held.items():
                leases = [lease for lease in self.router._leases.on(replica.name) if lease.session == session]
                assert any(epoch in lease.epochs for lease in leases), "a session of nobody"
        while self.talks:
            self.hangs_up(0)
        self._run(self._pass_s(3 * LEASE_S))
        assert self.router.status().busy == self.router.status().waiting == 0
        for replica in self.replicas.values():
            assert not replica.held, "a slot that nobody gives back"
            assert self.router._leases.occupied(replica.name) == 0, "a slot that is kept for nobody"

    # ---- inside -----------------------------------------------------------------------------------------------

    def _run(self, what: Awaitable[object]) -> None:
        async def run() -> None:
            await what
            await settle(6)

        self.loop.run_until_complete(run())

    def _talk(self, session: str, ingress: str) -> Talk:
        line = Line(ingress, lambda: self.router, self.network)
        holding = Holding(line, Place(ingress, "elsewhere"), TENANT, session, self._later, self.clock, resumable=True)
        return Talk(ingress, holding)

    def _later(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        return self.loop.create_task(coroutine)

    def _pick(self, pick: int) -> Talk:
        return self.talks[pick % len(self.talks)]

    def _done(self, what: Awaitable[None]) -> bool:
        async def run() -> bool:
            task = asyncio.ensure_future(what)
            await settle(6)
            task.cancel()
            try:
                await task
            except (NotYours, asyncio.CancelledError):
                return False
            return True

        return self.loop.run_until_complete(run())

    def _ask(self, talk: Talk, asked: Awaitable[Grant]) -> Grant | None:
        """What it is given; a wait is given up."""

        async def ask() -> Grant | None:
            task = asyncio.ensure_future(asked)
            await settle(6)
            task.cancel()
            try:
                return await task
            except (ServingError, asyncio.CancelledError):
                return None

        grant = self.loop.run_until_complete(ask())
        if grant is not None:
            key = grant.session, grant.epoch
            assert key not in self.told, "an epoch was given twice"
            self.told[key] = grant.replica, talk
            assert grant.epoch == self.network.highest[grant.session], "an epoch was given that is not the highest"
        return grant

    def _open(self, talk: Talk, grant: Grant, *, adopt: bool = False) -> None:
        self._send(talk, grant, lambda replica: replica.open(grant, talk, adopt=adopt))

    def _close(self, talk: Talk, grant: Grant | None) -> None:
        if grant is not None:
            self._send(talk, grant, lambda replica: replica.close(grant.session, grant.epoch))

    def _send(self, talk: Talk, grant: Grant, what: Callable[[Slots], None]) -> None:
        replica, name = self.replicas[grant.replica], f"{talk.ingress} → {grant.replica}"
        self.network.send(name, lambda: what(replica))

    def _report(self, replica: Slots) -> None:
        if replica.deaf:
            return
        busy = tuple(
            SlotReport(session, epoch, "t", slot, talk.ingress, talk.holding.serial)
            for slot, (session, (epoch, talk)) in enumerate(replica.held.items())
        )
        reply = self.router.report(
            ReplicaReport(replica.name, f"node of {replica.name}", replica.name, SLOTS, "fake", True, busy)
        )
        for session, epoch in reply.close:
            replica.close(session, epoch)

    async def _pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.clock.time += 0.5
            for replica in self.replicas.values():
                self._report(replica)
            self.router.tick()
            await settle(5)


async def _gone(tasks: set[asyncio.Task[object]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)

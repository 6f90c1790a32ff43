"""A cluster without processes: the real router, real replicas with stages of arithmetic, and ingresses in miniature.

Everything that can go wrong is a method; time is a clock that stands still until it is moved. What a client hears is
compared, frame by frame, with an undisturbed run of its conversation.
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.errors import EngineLost, NotYours, ReplicaLost, ServingError, UnknownSession
from actors.journal import Journal
from actors.messages import FrameIn, OpenRequest
from graphs.stages import FrameKey, SessionSpec
from serving.router import SessionRouter
from serving.routing import AcquireRequest, Grant, ResumeRequest, RouterConfig
from tests.actor_fakes import frame_in, seed_of
from tests.cluster_node import TURNS, Node, Undisturbed
from tests.cluster_talk import Home, Talk
from tests.fake_clock import FakeClock, settle

LEASE_S = 3.0
BEAT_S = 0.5


class World:
    """Everything together. Ingresses are names: what an ingress knows is in its talks."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.clock = FakeClock()
        self.lives = 1  # of routers
        self.router = self._new_router()
        self.nodes: dict[str, Node] = {}
        self.talks: dict[str, Talk] = {}
        self.zombies: list[tuple[Node, FrameKey]] = []  # what former owners may still try to say
        self.granted: dict[str, Grant] = {}  # the last grant of each session
        self.count = 0

    def _new_router(self) -> SessionRouter:
        return SessionRouter(self.config, self.clock.now, epochs_before=self.lives * 1_000_000)

    # ---- what happens to machines -----------------------------------------------------------------------------

    async def start(self, slots: int) -> None:
        self.count += 1
        node = Node(f"r{self.count}", slots, self.clock)
        self.nodes[node.name] = node
        await settle(5)
        node.beat(self.router)

    async def kill(self, node: Node) -> None:
        await node.die()
        del self.nodes[node.name]
        self._notice()

    async def cut_off(self, node: Node, *, deaf: bool, far: bool) -> None:
        """From the router, from the ingresses, from both; or back. A trunk that is lost is lost for both ends."""
        if far and not node.far:
            for call in list(node.replica._calls):
                node.replica.leave(call.session, call.epoch, call.sink)
        node.deaf, node.far = deaf, far
        self._notice()
        await settle(TURNS)

    async def restart_router(self) -> None:
        self.lives += 1
        self.router = self._new_router()

    async def lose_ingress(self, ingress: str) -> None:
        """The process is gone: its trunks close, and nobody speaks for its conversations."""
        for talk in [talk for talk in self.talks.values() if talk.ingress == ingress]:
            self._hand_off(talk)
            for home in (talk.home, talk.next):
                if home is not None and home.node.alive and home.sink is not None:
                    home.node.replica.leave(talk.session, home.grant.epoch, home.sink)
        await settle(TURNS)

    def _notice(self) -> None:
        """Trunks that are dead are found so."""
        for talk in self.talks.values():
            for home in (talk.home, talk.next):
                if home is not None and not home.node.reachable:
                    home.lost = True

    def _hand_off(self, talk: Talk) -> None:
        """This ingress will not speak for it again; its client may come back to another."""
        talk.parked = True
        talk.ingress = ""

    async def beat(self) -> None:
        """All replicas report."""
        for node in list(self.nodes.values()):
            node.beat(self.router)
        await settle(TURNS)

    async def pass_s(self, seconds: float) -> None:
        for _ in range(round(seconds / BEAT_S)):
            await self.clock.advance(BEAT_S)
            await self.beat()
            self.router.tick()
        await self.beat()
        self.check_owners()

    # ---- what ingresses do ------------------------------------------------------------------------------------

    async def join(self, ingress: str) -> None:
        """A new caller, who is turned away when there is no room."""
        self.count += 1
        session = f"s{self.count}"
        talk = Talk(session, ingress, SessionSpec("voice", "", seed_of(session)), Undisturbed(session))
        grant = await self._ask(self.router.acquire(self._request(talk)))
        if grant is None:
            return
        self.talks[session] = talk
        talk.highest = grant.epoch
        talk.home = await self._open(talk, grant)
        if talk.home is None:
            self.forget(talk)

    async def speak(self, talk: Talk, frames: int) -> None:
        """So many frames of the user, answered if its home is well."""
        if talk.parked:
            return
        for _ in range(frames):
            number = talk.journal.heard_frames
            if number >= talk.heard + 20:
                break  # the client is held back
            talk.journal.heard(number, frame_in(talk.session, number).pcm)
            await self.feed(talk)

    async def feed(self, talk: Talk) -> None:
        """Offer what has been heard to home and next home."""
        for home in (talk.home, talk.next):
            if home is None or home.lost or home.ready is None:
                continue
            home.sent = max(home.sent, home.ready.next_frame)
            while home.sent < talk.journal.heard_frames and not home.lost:
                frame = frame_in(talk.session, home.sent, home.grant.epoch)
                try:
                    home.node.replica.offer(frame)
                except ServingError:
                    home.lost = True
                    break
                home.sent += 1
                await settle(TURNS)
        await settle(TURNS)

    async def leave(self, talk: Talk) -> None:
        """The client hangs up."""
        for home in (talk.next, talk.home):
            await self._close(talk, home)
        if talk.home is not None:
            self._release(talk, talk.home.grant.epoch)
        self.forget(talk)

    async def recover(self, talk: Talk) -> bool:
        """Its home is lost: another. Whether it speaks again."""
        if talk.parked:
            return False
        await self.abort_move(talk)
        avoid = () if talk.home is None or talk.home.node.reachable else (talk.home.node.name,)
        request = self._request(talk, recovery=True, after_epoch=talk.highest, avoid=avoid, unreachable=bool(avoid))
        grant = await self._ask(self.router.acquire(request))
        if grant is None:
            return False
        self._old(talk, talk.home)
        talk.highest = max(talk.highest, grant.epoch)
        home = await self._open(talk, grant, Journal.from_bytes(talk.journal.to_bytes()))
        if home is None:
            self._release(talk, grant.epoch, opened=False)
            return False
        talk.home = home
        await self.feed(talk)
        return not talk.lost

    async def begin_move(self, talk: Talk) -> None:
        if talk.parked or talk.lost or talk.next is not None or talk.home is None or talk.home.ready is None:
            return
        grant = await self._ask(self.router.prepare(self._request(talk, after_epoch=talk.highest)))
        if grant is None:
            return
        assert grant.replica != talk.home.node.name
        talk.highest = max(talk.highest, grant.epoch)
        talk.next = await self._open(talk, grant, Journal.from_bytes(talk.journal.to_bytes()), of_next=True)
        if talk.next is None:
            self._release(talk, grant.epoch, opened=False)
            return
        await self.feed(talk)

    async def end_move(self, talk: Talk) -> None:
        """Go over to the next home, if it has caught up; one that is lost is given up."""
        old, new = talk.home, talk.next
        if new is not None and new.lost:
            await self.abort_move(talk)
            return
        if old is None or new is None or new.ready is None or talk.parked:
            return
        if talk.heard < talk.journal.heard_frames and not old.lost:
            return
        try:
            await asyncio.wait_for(self.router.commit(talk.session, new.grant.epoch, talk.ingress), 0.001)
        except (UnknownSession, TimeoutError):
            await self.abort_move(talk)
            return
        except ServingError:
            talk.over = True
            self.forget(talk)
            return
        talk.home, talk.next = new, None
        self._replay(talk, new)
        await self._close(talk, old)
        await self.feed(talk)

    async def abort_move(self, talk: Talk) -> None:
        if talk.next is not None:
            await self._close(talk, talk.next)
            self._release(talk, talk.next.grant.epoch)
            talk.next = None

    async def park(self, talk: Talk) -> None:
        """The client's socket breaks."""
        await self.abort_move(talk)
        talk.parked = True

    async def resume(self, talk: Talk, ingress: str) -> bool:
        """The client comes back, to any ingress, with its token."""
        request = ResumeRequest(talk.session, talk.serial, "t", ingress, "elsewhere")
        grant = await self._ask(self.router.resume(request))
        if grant is None:
            return False
        old = talk.home
        again = Talk(talk.session, ingress, talk.spec, talk.truth)
        again.highest, again.serial, again.heard = grant.epoch, grant.serial, talk.heard
        home = await self._open(again, grant, adopt=True)
        if home is None or home.ready is None:
            return False  # the token may be used again in a while
        talk.over = True
        self._old(talk, old)
        self.talks[talk.session] = again
        again.home = home
        again.journal = home.parts.journal
        again.heard = again.journal.next_frame
        home.sent = again.journal.heard_frames
        await settle(TURNS)
        return True

    def forget(self, talk: Talk) -> None:
        talk.over = True
        if self.talks.get(talk.session) is talk:
            del self.talks[talk.session]

    # ---- inside -----------------------------------------------------------------------------------------------

    def _request(self, talk: Talk, **changed: Any) -> AcquireRequest:
        return AcquireRequest(
            talk.session, "t", None, talk.ingress, "elsewhere", resumable=True, serial=talk.serial, **changed
        )

    async def _ask(self, answer: Any) -> Grant | None:
        """The router's grant, or None for whatever it says instead; a wait for a new router to settle is given up."""
        task = asyncio.ensure_future(answer)
        await settle(10)
        if not task.done():
            task.cancel()
        try:
            grant = await task
        except (ServingError, asyncio.CancelledError):
            return None
        assert isinstance(grant, Grant)
        former = self.granted.get(grant.session)
        assert former is None or grant.epoch > former.epoch or grant == former, "an epoch was given twice"
        self.granted[grant.session] = grant
        return grant

    async def _open(
        self, talk: Talk, grant: Grant, journal: Journal | None = None, *, adopt: bool = False, of_next: bool = False
    ) -> Home | None:
        """Open at what was granted; None when that is out of reach or refuses."""
        node = self.nodes.get(grant.replica)
        if node is None or not node.reachable:
            return None
        home = Home(grant, node)
        home.sink = lambda message: talk.take(home, message)
        request = OpenRequest(
            talk.session, grant.epoch, "t", talk.ingress, talk.spec, True, grant.serial, adopt=adopt,
            journal_bytes=0 if journal is None else 1,
        )  # fmt: skip
        if of_next:
            talk.next = home
        else:
            talk.home = home
        if journal is not None:
            home.sent = journal.next_frame
        try:
            await node.replica.open(request, home.sink, journal)
        except ServingError:
            home.lost = True
            return None
        await settle(TURNS)
        return home

    async def _close(self, talk: Talk, home: Home | None) -> None:
        if home is None:
            return
        self._old(talk, home)
        if home.node.reachable:
            await home.node.replica.close(talk.session, home.grant.epoch, "closed", home.sink)

    def _release(self, talk: Talk, epoch: int, *, opened: bool = True) -> None:
        try:
            self.router.release(talk.session, epoch, talk.ingress, opened=opened)
        except NotYours:
            return  # it has run out

    def _old(self, talk: Talk, home: Home | None) -> None:
        if home is not None:
            self.zombies.append((home.node, FrameKey(talk.session, home.grant.epoch, home.sent)))

    def _replay(self, talk: Talk, home: Home) -> None:
        """What the next home has answered already and nobody took: from its messages."""
        for message in list(home.parts.frames):
            if message.key.frame == talk.heard:
                talk.journal.take(message)
                talk.heard += 1

    # ---- what must always hold --------------------------------------------------------------------------------

    def check(self) -> None:
        for node in self.nodes.values():
            held = [slot.session for slot in node.replica.report()]
            assert len(held) == len(set(held)) <= node.replica.slots
        for view in self.router.replicas():
            assert view.free <= view.slots - view.busy - view.arriving
        for talk in self.talks.values():
            assert talk.heard <= talk.journal.heard_frames
            assert talk.home is None or talk.next is None or talk.home.grant.epoch != talk.next.grant.epoch

    def check_owners(self) -> None:
        """When all reports are in, every conversation that a replica holds has a lease there, and every lease one."""
        leases = self.router._leases
        for node in self.nodes.values():
            if node.deaf:
                continue
            held = {(slot.session, slot.epoch) for slot in node.replica.report()}
            owned = leases.on(node.name)
            assert held == {key for key in held if any(key in [(x.session, e) for e in x.epochs] for x in owned)}
            assert all(lease.is_in(dict(held)) for lease in owned if lease.confirmed)
            assert len({lease.session for lease in owned}) == len(owned)

    def say_as_zombies(self) -> None:
        """Nobody who was replaced is listened to."""
        for node, key in self.zombies:
            if not node.alive:
                continue
            present = next((s for s in node.replica.report() if s.session == key.session), None)
            if present is not None and present.epoch <= key.epoch:
                continue  # its close or its loss has not been noticed there: cut off, and fenced by the lease
            try:
                node.replica.offer(FrameIn(key, frame_in(key.session, key.frame).pcm))
            except (NotYours, EngineLost, ReplicaLost):
                continue
            raise AssertionError(f"{node.name} took a frame of an epoch that is over: {key}")

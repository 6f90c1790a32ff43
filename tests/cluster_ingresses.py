"""Ingresses in miniature, over a cluster without processes: they hold their slots as real ones do (`Holding`).

An ingress is a name: what it knows is in its talks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from actors.errors import EngineLost, NotYours, ReplicaLost, ServingError, UnknownSession
from actors.journal import Journal
from actors.messages import FrameIn
from graphs.stages import FrameKey, SessionSpec
from serving.holding import Holding, Place
from serving.router import SessionRouter
from serving.routing import Grant
from serving.tenants import Tenant
from tests.actor_fakes import frame_in, seed_of
from tests.cluster_node import TURNS, Node, Undisturbed
from tests.cluster_talk import Home, Talk
from tests.fake_clock import FakeClock, settle
from tests.ingress_line import IngressLine

TENANT = Tenant("t")
T = TypeVar("T")


class Ingresses:
    """All ingresses of a cluster, and the conversations that they carry."""

    def __init__(self, nodes: dict[str, Node], router: Callable[[], SessionRouter], clock: FakeClock) -> None:
        self.talks: dict[str, Talk] = {}
        self._zombies: list[tuple[Node, FrameKey]] = []  # what former owners may still try to say
        self._granted: dict[str, Grant] = {}  # the last grant of each session
        self._nodes, self._router, self._clock = nodes, router, clock
        self._count = 0

    # ---- what happens to them ---------------------------------------------------------------------------------

    async def lose(self, ingress: str) -> None:
        """The process is gone: its trunks close, and nobody speaks for its conversations."""
        for talk in [talk for talk in self.talks.values() if talk.ingress == ingress]:
            # It will not speak for it again, nor to the router; its client may come back to another.
            talk.parked = True
            talk.ingress = ""
            for home in (talk.home, talk.next):
                if home is not None and home.node.alive and home.sink is not None:
                    home.node.replica.leave(talk.session, home.grant.epoch, home.sink)
        await settle(TURNS)

    def notice(self) -> None:
        """Trunks that are dead are found so."""
        for talk in self.talks.values():
            for home in (talk.home, talk.next):
                if home is not None and not home.node.reachable:
                    home.lost = True

    # ---- what they do -------------------------------------------------------------------------------------------

    async def join(self, ingress: str) -> None:
        """A new caller, who is turned away when there is no room."""
        self._count += 1
        session = f"s{self._count}"
        spec = SessionSpec("voice", "", seed_of(session))
        talk = Talk(ingress, self._holding(session, ingress), spec, Undisturbed(session))
        grant = await self._ask(talk.holding.acquire(0.0))
        if grant is None:
            return
        self.talks[session] = talk
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
        if talk.ingress:
            await talk.holding.give_back(opened=True)
        self.forget(talk)

    async def recover(self, talk: Talk) -> bool:
        """Its home is lost: another. Whether it speaks again."""
        if talk.parked:
            return False
        await self.abort_move(talk)
        avoid = () if talk.home is None or talk.home.node.reachable else (talk.home.node.name,)
        grant = await self._ask(talk.holding.acquire(0.0, avoid, recovery=True, unreachable=bool(avoid)))
        if grant is None:
            return False
        self._old(talk, talk.home)
        home = await self._open(talk, grant, Journal.from_bytes(talk.journal.to_bytes()))
        if home is None:
            return False  # the next grant takes this one's place
        talk.home = home
        await self.feed(talk)
        return not talk.lost

    async def begin_move(self, talk: Talk) -> None:
        if talk.parked or talk.lost or talk.next is not None or talk.home is None or talk.home.ready is None:
            return
        grant = await self._ask(talk.holding.prepare(0.0))
        if grant is None:
            return
        assert grant.replica != talk.home.node.name
        talk.next = await self._open(talk, grant, Journal.from_bytes(talk.journal.to_bytes()), of_next=True)
        if talk.next is None:
            talk.holding.undo(opened=False)
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
            await self._soon(talk.holding.commit())
        except (UnknownSession, asyncio.CancelledError):
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
            if talk.ingress:
                talk.holding.undo(opened=True)
            talk.next = None

    async def park(self, talk: Talk) -> None:
        """The client's socket breaks."""
        await self.abort_move(talk)
        talk.parked = True

    async def resume(self, talk: Talk, ingress: str) -> bool:
        """The client comes back, to any ingress, with its token."""
        again = Talk(ingress, self._holding(talk.session, ingress), talk.spec, talk.truth)
        grant = await self._ask(again.holding.resume(talk.holding.serial))
        if grant is None:
            return False
        old = talk.home
        again.heard = talk.heard
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

    def _holding(self, session: str, ingress: str) -> Holding:
        line = IngressLine(ingress, self._router)
        place = Place(ingress, "elsewhere")
        return Holding(line, place, TENANT, session, asyncio.create_task, self._clock, resumable=True)

    async def _soon(self, answer: Awaitable[T]) -> T:
        """The router's answer if it comes at once; a wait, for room or for a new router to settle, is given up."""
        task = asyncio.ensure_future(answer)
        await settle(10)
        if not task.done():
            task.cancel()
        return await task

    async def _ask(self, answer: Awaitable[Grant]) -> Grant | None:
        """The router's grant, or None for whatever it says instead."""
        try:
            grant = await self._soon(answer)
        except (ServingError, asyncio.CancelledError):
            return None
        former = self._granted.get(grant.session)
        assert former is None or grant.epoch > former.epoch or grant == former, "an epoch was given twice"
        self._granted[grant.session] = grant
        return grant

    async def _open(
        self, talk: Talk, grant: Grant, journal: Journal | None = None, *, adopt: bool = False, of_next: bool = False
    ) -> Home | None:
        """Open at what was granted; None when that is out of reach or refuses."""
        node = self._nodes.get(grant.replica)
        if node is None or not node.reachable:
            return None
        home = Home(grant, node)
        home.sink = lambda message: talk.take(home, message)
        read = 0 if journal is None else 1
        request = talk.holding.request(grant.epoch, talk.spec, journal_bytes=read, adopt=adopt)
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

    def _old(self, talk: Talk, home: Home | None) -> None:
        if home is not None:
            self._zombies.append((home.node, FrameKey(talk.session, home.grant.epoch, home.sent)))

    def _replay(self, talk: Talk, home: Home) -> None:
        """What the next home has answered already and nobody took: from its messages."""
        for message in list(home.parts.frames):
            if message.key.frame == talk.heard:
                talk.journal.take(message)
                talk.heard += 1

    # ---- what must always hold --------------------------------------------------------------------------------

    def check(self) -> None:
        for talk in self.talks.values():
            assert talk.heard <= talk.journal.heard_frames
            assert talk.home is None or talk.next is None or talk.home.grant.epoch != talk.next.grant.epoch

    def say_as_zombies(self) -> None:
        """Nobody who was replaced is listened to."""
        for node, key in self._zombies:
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

"""A conversation's way to another replica: after a death, and for a planned move, by the same steps.

    a slot elsewhere ─ the journal goes there ─ Ready ─ the frames since ─┬─ home lost: over to it at once
                                                                          └─ home lives: both work; over to it when
                                                                             it is level and has said the same

Whatever fails on the way is tried again, elsewhere, until `recovery_s` is over; a move whose conversation goes on
living where it is gives up at the first trouble, and is asked for again. docs/decisions/failover.md has the states.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from actors.errors import (
    BadRequest,
    ConversationBroken,
    Lost,
    NoCapacity,
    Quarantined,
    ReplicaLost,
    ServingError,
    StaleEpoch,
    from_code,
)
from actors.interfaces import Clock
from actors.journal import Journal
from actors.messages import Down, Failed, FrameOut, Need, Ready
from serving.holding import Holding, pause
from serving.home import Home, TrunkPort
from serving.routing import Grant
from serving.shadow import Shadow
from serving.steps import Steps

if TYPE_CHECKING:
    from serving.residence import Residence

log = logging.getLogger(__name__)
T = TypeVar("T")

AVOID_S = 1.0  # the router may not know yet that it is gone; it may also be the only one there is, and back soon
AGAIN_S = 0.2  # between two tries when nobody has room
LEVEL_S = 5.0  # who was asked to move and is not level by then goes over all the same: its home is to be emptied
CHECKED_FRAMES = 3  # answers that are compared, at least, before a conversation that speaks goes over


class TrunkSource(Protocol):
    async def get(self, address: str) -> TrunkPort:
        """The live trunk to a replica. Raises ReplicaLost."""
        ...


class Relocation:
    """One run from wherever the conversation is to a home of its own. `run` is a task; it fails the conversation
    if there is no way, and leaves nothing behind when it is cancelled."""

    def __init__(
        self,
        call: Residence,
        holding: Holding,
        trunks: TrunkSource,
        clock: Clock,
        recovery_s: float,
        *,
        apart: bool = False,
    ) -> None:
        """`apart`: nobody asked for it, it is only to live on another node than this ingress."""
        self.next: Home | None = None
        self._apart = apart
        self.holds = False  # no frame may go to the old home: the journal is to stand still
        self._call = call
        self._holding = holding
        self._trunks = trunks
        self._clock = clock
        self._recovery_s = recovery_s
        self._ends_s = clock.now() + recovery_s
        self._unreachable = False  # the last home was lost, and did not say that somebody else has the conversation
        self._refused = False  # no other replica would say otherwise
        self._avoid: dict[str, float] = {}  # replica → until when
        self._failure: ServingError | None = None  # of the next home
        self._waits = False  # the next home is level: nothing is missing but the router's word
        self._shadow = Shadow(call.journal)

    def replace_home(self) -> bool:
        """Go over at once, if the next home is level; whether it was."""
        if not self._waits or self._failure is not None or self.next is None:
            return False
        self._go_over(self.next)
        return True

    def home_lost(self, replica: str, error: ServingError) -> None:
        """The conversation has no home (any more); do not go back there for a while."""
        # Who is told that his epoch is over may find that a resume he has not heard of has won.
        self._unreachable = not isinstance(error, StaleEpoch)
        self._avoid[replica] = self._clock.now() + AVOID_S
        self._ends_s = self._clock.now() + self._recovery_s

    async def run(self) -> None:
        """Until the conversation has a home again. A move that fails is given up: it still has the old one."""
        call = self._call
        while True:
            error = await self._attempt()
            if error is not None:
                level = logging.DEBUG if self._apart else logging.WARNING
                log.log(level, "session %s: not at a new home: %s", call.session, error)
            if call.home is not None:
                return
            if error is not None and (self._refused or self._clock.now() >= self._ends_s):
                call.fail(error)
                return
            if error is not None and not isinstance(error, Lost):
                await pause(self._clock, AGAIN_S)

    async def _attempt(self) -> ServingError | None:
        """One try at one replica. None when the conversation has gone over to it."""
        call, home, former = self._call, None, self._call.home
        self._failure, self._shadow = None, Shadow(call.journal)
        steps = Steps(self._clock)
        try:
            grant = await self._slot()
            steps.done("slot")
            self._avoid[grant.replica] = self._clock.now() + AVOID_S  # should this come to nothing
            home = self.next = Home(grant, await self._trunks.get(grant.address))
            steps.done("trunk")
            home.attach(call.deliver)
            await self._open(home)
            steps.done("ready")
            await self._level(home)
            steps.done("level")
            # Committed while the old home still speaks, so that a slot that has run out costs nothing. The router may
            # tell the old home before it tells us: see Residence.lose.
            self._waits = True
            await self._unless(self._holding.commit(), lambda: call.home is not former)
            if self._waits:
                self._go_over(home)
            await self._unless(self._holding.commit(), lambda: call.home is not home)
            if self._failure is not None:
                call.lose(home, self._failure)
            steps.done("over")
            log.info("session %s: at %s, epoch %d: %s", call.session, home.replica, grant.epoch, steps)
            return None
        except ServingError as error:
            log.info("session %s: as far as: %s", call.session, steps)
            if home is not None:
                call.lose(home, error)  # if it is home already: what is not committed is nobody's
            return error
        finally:
            self.next, self.holds, self._waits = None, False, False
            if home is None or call.home is not home:
                if home is not None:
                    home.leave("the conversation went elsewhere")
                self._holding.undo(opened=home is not None)
            call.feed()

    async def _slot(self) -> Grant:
        """A slot that takes this one's place: a second one while the conversation has a home, else one in a hurry."""
        call, now_s = self._call, self._clock.now()
        left_s = max(0.0, self._ends_s - now_s)
        avoid = tuple(name for name, until_s in self._avoid.items() if until_s > now_s)
        if call.home is not None:
            wait_s = 0.0 if self._apart else left_s
            asking = self._holding.prepare(wait_s, avoid, apart=self._apart)
            grant = await self._unless(asking, lambda: call.home is None)
            if grant is None:
                raise ReplicaLost("The replica was lost while its conversation waited for another.")
            return grant
        try:
            return await self._holding.acquire(
                left_s, avoid, recovery=True, deaths=call.deaths, unreachable=self._unreachable
            )
        except (StaleEpoch, Quarantined):
            self._refused = True
            raise

    async def _open(self, home: Home) -> None:
        """The journal goes there, and Ready comes back. Raises what is said against it, and NoCapacity for a replica
        of a build that takes no journals."""
        call = self._call
        if call.home is not None and not self._exact(home):
            # The two would not say the same: the old one is silent from here on, so that one journal holds for both.
            self.holds = True
            await self._until(lambda: call.home is None or call.home.in_flight == 0)
        if call.journal.next_frame == 0:
            home.ask(self._holding.request(home.grant.epoch, call.spec))
        elif home.takes_journals:
            journal = snapshot(call.journal, call.codec_s)
            request = self._holding.request(home.grant.epoch, call.spec, journal_bytes=len(journal))
            await home.ask_to_go_on(request, journal)
        else:
            raise NoCapacity("The replica that was chosen is of a build that takes no conversations over.")
        await self._until(lambda: home.ready is not None or self._failure is not None)
        if self._failure is not None:
            call.count_death(home, self._failure)
            self._refused = not call.begun and isinstance(self._failure, BadRequest)
            raise self._failure

    async def _level(self, home: Home) -> None:
        """While the old home lives, both get every frame, until the next one has said all that the old one has."""
        call, shadow = self._call, self._shadow

        def level() -> bool:
            if self._failure is not None or shadow.differences:
                return True
            behind = call.journal.next_frame - home.answered
            idle = call.home is not None and call.home.in_flight == 0
            return call.home is None or (behind <= 0 and (idle or shadow.checked >= CHECKED_FRAMES))

        call.feed()
        late = False
        try:
            await self._clock.wait_for(self._until(level), LEVEL_S)
        except TimeoutError:
            late = True
        if call.home is None:
            return  # there is no choice any more
        if self._failure is not None:
            raise self._failure
        if late and self._apart:
            # Its home is as good as before, and nobody wants it emptied: going over now would be heard as a gap.
            raise NoCapacity(f"Replica {home.replica} has too much to do to catch up with another conversation.")
        if late:
            log.warning("session %s: %s is not level yet", call.session, home.replica)
        if shadow.differences:
            call.differs = True  # next time one speaks at a time
            raise ConversationBroken("The next replica computed other tokens than the one before it.")

    def _go_over(self, home: Home) -> None:
        self._waits = False
        self._call.go_over(home, self._shadow.ahead)

    def deliver(self, home: Home, message: Down) -> None:
        """What the next home says, before it is home."""
        if isinstance(message, FrameOut):
            home.heard(message)
            self._shadow.take(message)
        elif isinstance(message, Ready) and home.ready is None:
            home.begin(message)
        elif isinstance(message, Failed):
            self._failure = from_code(message.code, message.message)
        elif isinstance(message, Need):
            self._try(lambda: home.needs(message, self._call.journal))
        self.feed()

    def feed(self) -> None:
        """The next home is to have all that was heard."""
        home = self.next
        if home is not None and not self.holds:
            self._try(lambda: home.feed(self._call.journal))

    def _try(self, work: Callable[[], None]) -> None:
        """A next home that cannot be spoken to is lost."""
        try:
            work()
        except ServingError as error:
            self._failure = self._failure or error

    def _exact(self, home: Home) -> bool:
        return home.grant.numerics_id == self._call.journal.numerics_id and not self._call.differs

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Raises ReplicaLost when the time is over: the one that is waited for takes too long."""
        while not holds():
            try:
                await self._clock.wait_for(self._call.news(), self._ends_s - self._clock.now())
            except TimeoutError:
                raise ReplicaLost("The replica that was to take the conversation over took too long.") from None

    async def _unless(self, work: Coroutine[Any, Any, T], stop: Callable[[], bool]) -> T | None:
        """The result of `work`; None as soon as `stop()` holds, and then the work has been cancelled and is over."""

        async def stops() -> None:
            while not stop():
                await self._call.news()

        task, stopped = asyncio.create_task(work), asyncio.create_task(stops())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stopped):
                each.cancel()
            await asyncio.gather(task, stopped, return_exceptions=True)


def snapshot(journal: Journal, codec_s: float) -> bytes:
    """A journal as of its last answer, with as much sound as a codec needs: what was heard since follows as frames."""
    at = Journal(journal.session, journal.spec, codec_s)
    at.begin(journal.prompt_hash, journal.prompt_frames, journal.numerics_id)
    at.anchor_frame = journal.anchor_frame
    at.rows.take_over(journal.rows)
    at.pending = journal.pending
    at.controls = list(journal.controls)
    at.pcm.take_over(journal.pcm, journal.next_frame)
    at.user_codes.take_over(journal.user_codes)
    at.agent_codes.take_over(journal.agent_codes)
    return at.to_bytes()

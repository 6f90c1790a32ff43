"""Which slot a conversation speaks from: the state machine behind its not being dropped.

    opening ── Ready ──▶ living ◀─────────────── over to the next home ──┐
       │                 │    └── asked to move ──▶ relocation, ─────────┤   (nothing is heard of it)
       │                 │                          home lives on        │
       └── home lost ────┴──────────────────────▶ relocation, no home ───┘   (the agent is silent, the user is heard)
                                                        └── recovery_s over, or no use ──▶ the conversation fails

Everything that leads to another home is the relocation's (serving/relocation.py). Here is what holds whichever home
it is: answers count once, in order, and from the home alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from actors.errors import (
    BadRequest,
    ClientFault,
    JournalError,
    Lost,
    NotYours,
    Refused,
    ServingError,
    Unauthorized,
    from_code,
)
from actors.interfaces import Clock
from actors.journal import Journal
from actors.messages import Down, Failed, FrameOut, Move, Need, Ready
from graphs.stages import SessionSpec
from serving.apart import Elsewhere
from serving.holding import Holding, pause
from serving.home import Home
from serving.relocation import Relocation, TrunkSource

log = logging.getLogger(__name__)

SAFE_FRAMES = 25  # who has answered so many has not been killed by taking the conversation over
APART_AFTER_S = 3.0  # whose slot is on our own node looks for another when it has lived there for so long
APART_AGAIN_S = 1.0  # after a try that came to nothing; twice as long after each further one: a try costs a rebuild
APART_SELDOM_S = 16.0
_CLIENTS_OWN = (BadRequest, ClientFault, Unauthorized)  # what another replica would not cure


class Speaker(Protocol):
    """The conversation, as its residence knows it."""

    def begun(self, ready: Ready) -> None:
        """A home wants frames: the first one, or another one after a loss."""

    def resumed(self) -> None:
        """It goes on after a loss."""

    def answer(self, frame: FrameOut) -> None:
        """An answer, perhaps one that was given before. Raises JournalError when one is missing."""

    def lost(self) -> None:
        """There is no home for now."""

    def fail(self, error: ServingError) -> None:
        """There will be none."""

    def wake(self) -> None:
        """Something has changed."""

    async def news(self) -> None:
        """Until something changes."""


class Residence:
    """The homes of one conversation, one after the other, and at most one that is being prepared."""

    def __init__(
        self,
        speaker: Speaker,
        journal: Journal,
        holding: Holding,
        trunks: TrunkSource,
        clock: Clock,
        recovery_s: float,
        codec_s: float,
        elsewhere: Elsewhere,
    ) -> None:
        self.journal = journal
        self.home: Home | None = None  # the slot it speaks from
        self.begun = False  # its prompt has been in a KV cache
        self.deaths = 0  # homes in a row that died before it had said SAFE_FRAMES there
        self._proven = False  # it moved to its home from one where it had said so many: see go_over
        self.differs = False  # a next home has once said something else: from now on one speaks at a time
        self.exact = True  # False once it went on under other numerics
        self.recoveries = self.moves = 0
        self._over = False
        self._speaker = speaker
        self._holding = holding
        self._trunks = trunks
        self._clock = clock
        self._recovery_s, self.codec_s = recovery_s, codec_s
        self._elsewhere = elsewhere
        self._relocation: Relocation | None = None
        self._relocating: asyncio.Task[None] | None = None
        self._moving_apart: asyncio.Task[None] | None = None

    @property
    def session(self) -> str:
        return self.journal.session

    @property
    def spec(self) -> SessionSpec:
        return self.journal.spec

    @property
    def settled(self) -> bool:
        """Whether it is at home, and nobody asks it to leave."""
        return self._relocation is None

    @property
    def apart(self) -> bool:
        """Whether slot and journal are on two nodes, so that one machine's death does not take both."""
        return self.home is not None and not self._holding.is_near(self.home)

    def begin(self, home: Home) -> None:
        """Ask for this slot, the first one."""
        self.home = home
        try:
            home.attach(self.deliver)
            home.ask(self._holding.request(home.grant.epoch, self.spec))
        except Lost as error:
            self.lose(home, error)

    def take_over(self, home: Home, first_missed: int, messages: Iterable[Down]) -> None:
        """Go on in a slot that was another ingress's until now; `messages` have come from it meanwhile."""
        self.home = home
        try:
            home.attach(self.deliver)
            home.repeat(first_missed, self.journal.next_frame, self.journal)
        except Lost as error:
            self.lose(home, error)
        for message in messages:
            self.deliver(home, message)

    def feed(self) -> None:
        """Send what was heard to whoever is to hear it."""
        home, relocation = self.home, self._relocation
        if home is not None and not (relocation is not None and relocation.holds):
            try:
                home.feed(self.journal)
            except Lost as error:
                self.lose(home, error)
        if relocation is not None:
            relocation.feed()

    def deliver(self, home: Home, message: Down) -> None:
        """Take one message off a trunk. Never blocks."""
        if self._over:
            return
        if home is self.home:
            try:
                self._take(home, message)
            except (Lost, JournalError) as error:
                self.lose(home, error)
        elif self._relocation is not None and home is self._relocation.next:
            self._relocation.deliver(home, message)
        self._speaker.wake()  # of a home that was left nothing is heard any more

    def _take(self, home: Home, message: Down) -> None:
        match message:
            case FrameOut():
                home.heard(message)
                if home.frames >= SAFE_FRAMES:
                    self.deaths = 0
                self._speaker.answer(message)
                self.feed()
            case Ready() if home.ready is None:
                home.begin(message)
                self._settle(home, message)
            case Failed(code=code, message=sentence):
                self.lose(home, from_code(code, sentence))
            case Need():
                home.needs(message, self.journal)
            case Move(reason=reason):
                log.info("session %s is asked to leave %s: %s", self.session, home.replica, reason)
                self._relocate()

    def lose(self, home: Home, error: ServingError) -> None:
        """A home is gone, or of no more use. The conversation looks for another, unless that would not help."""
        if home is not self.home or self._over:
            return
        if isinstance(error, _CLIENTS_OWN) and not self.begun:
            self._speaker.fail(error)
            return
        self.count_death(home, error, proven=self._proven)
        relocation = self._relocate()
        relocation.home_lost(home.replica, error)
        if relocation.replace_home():
            # Most often the router has told it that its lease has moved on, and the same word to us is on its way.
            log.info("session %s: %s ended before the move was known to be done: %s", self.session, home.replica, error)
            self._proven = self._proven and isinstance(error, NotYours)  # else it may have died of this conversation
            return
        log.warning("session %s lost its home at %s: %s", self.session, home.replica, error)
        self.home = None
        home.leave("the conversation goes on elsewhere")
        self._speaker.lost()
        self._speaker.wake()

    def count_death(self, home: Home, error: ServingError, *, proven: bool = False) -> None:
        """Note what may have been this conversation's doing: a replica that dies soon after it took it."""
        if home.frames >= SAFE_FRAMES or proven:
            self.deaths = 0
        elif not isinstance(error, Refused | NotYours):  # those are not about this conversation
            self.deaths += 1

    def go_over(self, home: Home, ahead: Iterable[FrameOut]) -> None:
        """Speak from this home on; `ahead` is what it has answered beyond the one before it."""
        former, self.home = self.home, home
        # Who moves has been read and answered in full by two replicas, one of which lives on: if the other dies now,
        # that says no more of the conversation than if it had not moved.
        self._proven = former is not None and (former.frames >= SAFE_FRAMES or self._proven)
        if former is None:
            self.recoveries += 1
            self._speaker.resumed()
        else:
            self.moves += 1
            former.leave("the conversation has moved")
        assert home.ready is not None
        self._settle(home, home.ready)
        for frame in ahead:
            self._speaker.answer(frame)
        self._speaker.wake()

    def end(self) -> None:
        """Look for no home any more."""
        self._over = True
        for task in (self._relocating, self._moving_apart):
            if task is not None:
                task.cancel()

    def leave(self, *, desert: bool) -> None:
        """Let go of the slot; with `desert` it waits at its replica for who resumes the conversation."""
        self.end()
        home, self.home = self.home, None
        if home is not None and desert:
            home.desert()
        elif home is not None:
            home.leave("the conversation ended")

    async def left(self) -> None:
        """Wait until a relocation that was under way has given back what it had."""
        tasks = [task for task in (self._relocating, self._moving_apart) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _settle(self, home: Home, ready: Ready) -> None:
        numerics_id = ready.numerics_id or home.grant.numerics_id
        if not ready.exact or self.journal.numerics_id not in ("", numerics_id):
            self.exact = False
            log.warning("session %s goes on under other numerics, at %s", self.session, home.replica)
        self.journal.begin(ready.prompt_hash, ready.prompt_frames, numerics_id)
        self.begun = True
        self._speaker.begun(ready)
        self.feed()
        if self._holding.is_near(home) and (self._moving_apart is None or self._moving_apart.done()):
            self._moving_apart = asyncio.create_task(self._move_apart())

    async def _move_apart(self) -> None:
        """Slot and journal are not to die with one machine: as soon as another node has room, live there."""
        await pause(self._clock, APART_AFTER_S)
        wait_s = APART_AGAIN_S
        while True:
            async with self._elsewhere.turn():
                if self.home is None or self._over or not self._holding.is_near(self.home):
                    return
                if self.settled:
                    self._relocate(apart=True)
                    assert self._relocating is not None
                    await asyncio.wait({self._relocating})
            await pause(self._clock, wait_s)
            wait_s = min(2 * wait_s, APART_SELDOM_S)

    def _relocate(self, *, apart: bool = False) -> Relocation:
        if self._relocation is None:
            self._relocation = Relocation(self, self._holding, self._trunks, self._clock, self._recovery_s, apart=apart)
            self._relocating = asyncio.create_task(self._run(self._relocation))
        return self._relocation

    async def _run(self, relocation: Relocation) -> None:
        try:
            await relocation.run()
        finally:
            self._relocation = None

    # What a relocation needs of the conversation

    def fail(self, error: ServingError) -> None:
        self._speaker.fail(error)

    async def news(self) -> None:
        await self._speaker.news()

"""Coming back after a lost socket: tokens, the taking over of a live slot, the frames that were missed.

A token names a session and how often it has been resumed (its serial), and is signed for the tenant it was given
to. The router counts each serial once, so a token is good for one use; the next one comes with the conversation.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from actors.errors import JournalError, NotYours, ReplicaLost, ServingError, UnknownSession, from_code
from actors.interfaces import Clock
from actors.journal import Journal
from actors.journal_parts import PartsBin
from actors.messages import Down, Failed, FrameOut, JournalPart, Ready
from graphs.stages import SessionSpec
from serving.holding import Holding
from serving.home import MAX_IN_FLIGHT, Home
from serving.relocation import TrunkSource
from serving.tenants import Tenant

ADOPT_S = 10.0  # a slot that is there answers in milliseconds; its journal is some megabytes
AGAIN_WITHIN_S = 30.0  # a slot that could not be taken over waits so long for its client to try again
REPLAY_FRAMES = MAX_IN_FLIGHT  # as much as a replica answers again
PATIENCE_FRAMES = 12  # new frames that wait for missed ones; then those are not coming
_LABEL = b"personaplex resume token 1"


class NothingToResume(UnknownSession):
    """One error for whatever is wrong with a token: what exactly is nobody's business who holds a wrong one."""

    def __init__(self) -> None:
        super().__init__(
            "This resume token opens nothing: it was used before, came too late, or is another key's.",
            "Begin a new conversation.",
        )


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a token says."""

    session: str
    serial: int


class Tickets:
    """Issues and reads tokens. All ingresses of a system share the secret."""

    def __init__(self, secret: str) -> None:
        self._key = hmac.digest(secret.encode(), _LABEL, hashlib.sha256)

    def issue(self, session: str, serial: int, tenant: Tenant) -> str:
        """A token for the next resumption of this conversation by this tenant."""
        return f"{session}.{serial}.{self._sign(session, serial, tenant)}"

    def read(self, token: str, tenant: Tenant) -> Ticket:
        """Raises NothingToResume unless it was issued for this tenant."""
        session, _, rest = token.partition(".")
        number, _, signature = rest.partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 10 and signature.isascii()):
            raise NothingToResume
        if not hmac.compare_digest(signature, self._sign(session, int(number), tenant)):
            raise NothingToResume
        return Ticket(session, int(number))

    def _sign(self, session: str, serial: int, tenant: Tenant) -> str:
        # The tenant last: a name may hold any character, the other two cannot hold a full stop.
        signed = hmac.digest(self._key, f"{session}.{serial}.{tenant.name}".encode(errors="replace"), hashlib.sha256)
        return base64.urlsafe_b64encode(signed).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Missed:
    """How a client comes back: it has had `have` frames (None: it does not say), and wants to hear the rest, or not."""

    have: int | None = None
    replay: bool = False

    def first_frame(self, journal: Journal) -> int:
        """The first frame it is to get. As much is kept as may be on its way to a client that reads."""
        end = journal.next_frame
        if self.have is None:
            return end
        return min(end, max(self.have, end - REPLAY_FRAMES, journal.pcm.start))


@dataclass(frozen=True, slots=True)
class Adopted:
    """A live slot that is ours now; `messages` have come from it meanwhile, Ready first."""

    home: Home
    journal: Journal
    messages: list[Down]


async def adopt(holding: Holding, ticket: Ticket, trunks: TrunkSource, clock: Clock, receptive_s: float) -> Adopted:
    """Take a live conversation over from whichever ingress carried it. Raises NothingToResume, NoCapacity, Lost.

    Cancelled before the replica was asked it leaves things as they were: the router lets the token be used again.
    """
    try:
        grant = await holding.resume(ticket.serial)
    except NotYours:
        raise NothingToResume from None
    try:
        home = Home(grant, await trunks.get(grant.address))
    except BaseException:
        holding.unspend()
        raise
    if not home.takes_journals:
        raise NothingToResume
    arriving = _Arriving(clock)
    try:
        home.attach(arriving.take)
        # The replica knows what the conversation is; this says only whose it is now.
        home.ask(holding.request(grant.epoch, SessionSpec("", "", 0), adopt=True))
        await clock.wait_for(arriving.over.wait(), ADOPT_S)
        if arriving.failure is not None:
            raise arriving.failure
        blob = arriving.parts.take(holding.session, grant.epoch)
        return Adopted(home, Journal.from_bytes(blob, receptive_s), arriving.messages)
    except TimeoutError:
        holding.keep(home, AGAIN_WITHIN_S)
        raise ReplicaLost("The replica that holds the conversation did not hand it over.") from None
    except NotYours:
        holding.drop(home)
        raise NothingToResume from None
    except BaseException:
        holding.keep(home, AGAIN_WITHIN_S)
        raise


@dataclass(slots=True)
class _Arriving:
    """What a replica says while a conversation is being taken over."""

    clock: Clock
    parts: PartsBin = field(default_factory=PartsBin)
    messages: list[Down] = field(default_factory=list)
    failure: ServingError | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, home: Home, message: Down) -> None:
        if isinstance(message, JournalPart):
            try:
                self.parts.add(message, self.clock.now())
            except JournalError as error:
                self._fail(error)
        elif isinstance(message, Failed):
            self._fail(from_code(message.code, message.message))
        else:
            self.messages.append(message)
            if isinstance(message, Ready):
                self.over.set()

    def _fail(self, error: ServingError) -> None:
        self.failure = self.failure or error
        self.over.set()


class Replay:
    """Frames `first` … `end` - 1, which a client has missed: answered again, and heard before what is new."""

    def __init__(self, first: int = 0, end: int = 0) -> None:
        self._next = first
        self._end = end
        self._waiting: deque[FrameOut] = deque()  # new ones

    def __contains__(self, frame: FrameOut) -> bool:
        """Whether it is one of those that are still missed; they come in order."""
        return self._next <= frame.key.frame < self._end

    def take(self, frame: FrameOut) -> Iterator[FrameOut]:
        """What may be heard now that this frame has come."""
        if frame in self:
            self._next = frame.key.frame + 1
            yield frame
        else:
            self._waiting.append(frame)
        if self._next >= self._end or len(self._waiting) >= PATIENCE_FRAMES:
            yield from self.give_up()

    def give_up(self) -> Iterator[FrameOut]:
        """Miss them for good: what is new may be heard."""
        self._next = self._end
        while self._waiting:
            yield self._waiting.popleft()

"""A conversation's slot at one replica, as its ingress holds it: what was sent there, what has come back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from actors.errors import ConversationBroken, ReplicaLost
from actors.journal import Journal
from actors.journal_parts import cut
from actors.messages import CloseRequest, Down, DownSink, FrameIn, FrameOut, Need, OpenRequest, Ready, Up
from graphs.stages import FrameKey
from serving.routing import Grant

log = logging.getLogger(__name__)

# A replica takes 2 s of a conversation in flight and refuses more; staying below, we never meet that refusal.
MAX_IN_FLIGHT = 24
HANDOVER_VERSION = 2  # of the trunk: from it on conversations may change hands


class TrunkPort(Protocol):
    """A live trunk to one replica."""

    @property
    def version(self) -> int:
        """What both ends speak."""
        ...

    def attach(self, session: str, epoch: int, sink: DownSink) -> None: ...

    def detach(self, session: str, epoch: int) -> None: ...

    async def send(self, message: Up) -> None: ...

    def send_nowait(self, message: Up) -> None: ...


class Home:
    """One slot, from `attach` to `leave`. Knows its own frames; what they mean is the conversation's business."""

    def __init__(self, grant: Grant, trunk: TrunkPort) -> None:
        self.grant = grant
        self.ready: Ready | None = None
        self.sent = 0  # the first frame of the user that has not gone there
        self.answered = 0  # the first frame whose answer has not come from there
        self.frames = 0  # answers that have
        self._trunk = trunk
        self._attached = False
        self._needed: tuple[int, int] | None = None  # the last Need that was answered, and how far it was then

    @property
    def replica(self) -> str:
        return self.grant.replica

    @property
    def in_flight(self) -> int:
        return self.sent - self.answered

    @property
    def takes_journals(self) -> bool:
        return self._trunk.version >= HANDOVER_VERSION

    def attach(self, deliver: Callable[[Home, Down], None]) -> None:
        """From now on what the replica says of this slot goes to `deliver`. Raises ReplicaLost."""
        self._trunk.attach(self.grant.session, self.grant.epoch, lambda message: deliver(self, message))
        self._attached = True

    def ask(self, request: OpenRequest) -> None:
        """Ask for the slot; Ready, or Failed, will be delivered. Raises ReplicaLost."""
        self._trunk.send_nowait(request)

    async def ask_to_go_on(self, request: OpenRequest, journal: bytes) -> None:
        """Ask for the slot of a conversation that has been going on elsewhere. Raises ReplicaLost."""
        for part in cut(request.session, request.epoch, journal):
            await self._trunk.send(part)  # each in its turn: frames of others pass between them
        await self._trunk.send(request)

    def begin(self, ready: Ready) -> None:
        """The replica wants frames, from the one that Ready names on."""
        self.ready = ready
        self.sent = self.answered = ready.next_frame

    def feed(self, journal: Journal) -> None:
        """Send what was heard and is not there yet, as far as the replica takes it. Raises ReplicaLost."""
        if self.ready is None or self.sent >= journal.heard_frames or self.in_flight >= MAX_IN_FLIGHT:
            return
        pcm = journal.pcm
        until = min(pcm.next, self.answered + MAX_IN_FLIGHT)
        for frame, row in enumerate(pcm.rows(self.sent, until), start=self.sent):
            self._trunk.send_nowait(FrameIn(FrameKey(self.grant.session, self.grant.epoch, frame), row))
        self.sent = until

    def repeat(self, first: int, end: int, journal: Journal) -> None:
        """Ask for answers again that have been given already. Raises ReplicaLost."""
        for frame, row in enumerate(journal.pcm.rows(first, end), start=first):
            self._trunk.send_nowait(FrameIn(FrameKey(self.grant.session, self.grant.epoch, frame), row))

    def heard(self, frame: FrameOut) -> None:
        """Note an answer; one that was given before changes nothing."""
        if frame.key.frame >= self.answered:
            self.answered = frame.key.frame + 1
            self.frames += 1

    def needs(self, need: Need, journal: Journal) -> None:
        """The replica misses frames: send them again. Raises ConversationBroken if they are not kept, ReplicaLost."""
        if not journal.pcm.start <= need.need_frame < max(self.sent, 1):
            raise ConversationBroken(f"Frame {need.need_frame} is needed again and not kept any more.")
        if (need.need_frame, self.answered) == self._needed:
            return  # each frame that came too early says so; they are all on their way again
        self._needed = (need.need_frame, self.answered)
        self.sent = need.need_frame
        self.feed(journal)

    def leave(self, reason: str) -> None:
        """Give the slot back to its replica. Twice is once."""
        if not self._attached:
            return
        self.desert()
        try:
            self._trunk.send_nowait(CloseRequest(self.grant.session, self.grant.epoch, reason))
        except ReplicaLost:
            log.info("session %s: its slot at %s went with the replica", self.grant.session, self.replica)

    def desert(self) -> None:
        """Listen no more, and leave the slot as it is, to whoever takes it over."""
        self._attached = False
        self._trunk.detach(self.grant.session, self.grant.epoch)

"""A conversation at an ingress in miniature: its homes, its journal, and whether its client hears what it should."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.journal import Journal
from actors.messages import Down, DownSink, Failed, FrameOut, Move, Ready
from graphs.stages import SessionSpec
from serving.holding import Holding
from serving.routing import Grant
from tests.actor_fakes import Sink
from tests.cluster_node import Node, Undisturbed


@dataclass
class Home:
    """One replica's side of a conversation, as an ingress sees it."""

    grant: Grant
    node: Node
    sink: DownSink | None = None
    ready: Ready | None = None
    parts: Sink = field(default_factory=Sink)
    lost: bool = False
    leaving: bool = False
    sent: int = 0  # frames before this number have been offered


class Talk:
    """A conversation at its ingress: home, next home, journal; and what its client has heard."""

    def __init__(self, ingress: str, holding: Holding, spec: SessionSpec, truth: Undisturbed) -> None:
        self.ingress, self.holding, self.spec, self.truth = ingress, holding, spec, truth
        self.session = holding.session
        self.journal = Journal(self.session, spec)
        self.home: Home | None = None
        self.next: Home | None = None
        self.parked = False  # its client is gone and may come back
        self.over = False  # this ingress has nothing to do with it any more
        self.heard = 0  # frames of the agent that reached the client

    @property
    def lost(self) -> bool:
        return self.home is None or self.home.lost

    def take(self, home: Home, message: Down) -> None:
        """One message from a replica."""
        if self.over or home not in (self.home, self.next):
            return  # an old epoch's
        assert not isinstance(message, FrameOut) or message.key.epoch == home.grant.epoch
        home.parts.append(message)
        if isinstance(message, Ready):
            home.ready = message
        elif isinstance(message, Move):
            home.leaving = True
        elif isinstance(message, Failed):
            home.lost = True
        elif isinstance(message, FrameOut):
            number = message.key.frame
            tokens = [message.text_token, *message.codes.tolist()]
            assert (tokens, int(message.pcm[0])) == self.truth.frame(number), "other tokens than undisturbed"
            if number == self.heard and (home is self.home):
                self.journal.take(message)
                self.heard += 1
            else:
                assert number < self.heard or home is self.next, "a frame is missing"

"""The network of tests/epoch_world.py, on which everything may be late or lost, and the replicas beyond it as rules.

What one end sends to another arrives in order; how much later is for the adversary to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from actors.errors import NoCapacity, ServingError, StaleEpoch
from serving.holding import Holding
from serving.router import SessionRouter
from serving.routing import Grant
from tests.ingress_line import IngressLine

SLOTS = 3  # of each replica


@dataclass
class Talk:
    """A conversation at one ingress: what it holds, and where it believes to live."""

    ingress: str
    holding: Holding
    home: Grant | None = None
    next: Grant | None = None


@dataclass
class Slots:
    """A replica's rules: a higher epoch takes over, an equal one is the same asking again, a lower one is refused."""

    name: str
    held: dict[str, tuple[int, Talk]] = field(default_factory=dict)
    deaf: bool = False  # cut off from the router

    def open(self, grant: Grant, talk: Talk, *, adopt: bool) -> None:
        known = self.held.get(grant.session)
        if known is None and (adopt or len(self.held) == SLOTS):
            return
        if known is not None and grant.epoch < known[0]:
            return
        assert known is None or grant.epoch > known[0] or known[1] is talk, "an epoch opens a door for two owners"
        self.held[grant.session] = (grant.epoch, talk)

    def close(self, session: str, epoch: int) -> None:
        """Everything up to this epoch."""
        if session in self.held and self.held[session][0] <= epoch:
            del self.held[session]


class Network:
    """`keeps`: what is sent waits until the adversary lets it through. `loses_answers`: the router's do not arrive."""

    def __init__(self) -> None:
        self.loses_answers = self.keeps = False
        self.highest: dict[str, int] = {}  # epoch that any router has given to a session
        self._wires: dict[str, list[Callable[[], None]]] = {}  # who sends (and to which replica): what is on its way

    @property
    def busy(self) -> list[str]:
        """The wires on which something waits."""
        return [name for name, wire in self._wires.items() if wire]

    def send(self, wire: str, what: Callable[[], None]) -> None:
        self._wires.setdefault(wire, []).append(what)
        if not self.keeps:
            self.deliver(wire)

    def deliver(self, wire: str, *, one: bool = False) -> None:
        waiting = self._wires.get(wire, [])
        while waiting:
            with contextlib.suppress(ServingError):  # it had run out
                waiting.pop(0)()
            if one:
                return

    def make_peace(self) -> None:
        """All that waits arrives, and from now on all that is sent."""
        self.loses_answers = self.keeps = False
        for wire in self.busy:
            self.deliver(wire)


class Line(IngressLine):
    """One ingress's line to the router over this network."""

    def __init__(self, ingress: str, router: Callable[[], SessionRouter], network: Network) -> None:
        super().__init__(ingress, router)
        self._network = network

    async def commit(self, session: str, epoch: int) -> None:
        await super().commit(session, epoch)
        if self._network.loses_answers:
            raise StaleEpoch("The answer was lost, and the next one says this.")

    async def answer(self, asked: Awaitable[Grant]) -> Grant:
        grant = await asked
        # The router has decided so; whether anybody learns of it is another matter.
        self._network.highest[grant.session] = max(grant.epoch, self._network.highest.get(grant.session, 0))
        if self._network.loses_answers:
            raise NoCapacity("The answer was lost.")
        return grant

    def tell(self, what: Callable[[], None]) -> None:
        self._network.send(self.ingress, what)

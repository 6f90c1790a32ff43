"""The pages of an engine's conversations: who may be opened, who grows, who is parked when nobody was moved in time.

Parking is the last resort of an overcommitted cache. The router is told to migrate one long before
(graphs.kv_pressure); if nobody does, the youngest conversation's pages are taken, and it is rebuilt from its own rows,
bit for bit, as soon as there is room: it falls silent for that long, and nobody loses a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from graphs.conversation import Conversation, Fill
from graphs.kv_pressure import Holding, KVPressure, PressurePolicy
from graphs.paging import PagePool
from graphs.spans import KEY_BLOCK


class PageKeeper:
    """Speaks for the pool of one engine, whose conversations `talks` are, by slot."""

    def __init__(
        self,
        pool: PagePool,
        policy: PressurePolicy,
        talks: Mapping[int, Conversation],
        let_go: Callable[[int], None],
    ) -> None:
        """let_go: takes a conversation's rings away, with all their pages."""
        self.pool = pool
        self.policy = policy
        self.parked: list[int] = []  # in the order in which they are rebuilt
        self.times_parked = 0
        self._talks = talks
        self._let_go = let_go
        self._promised = 0  # pages for rows of this step that are not taken from the pool yet

    def admits(self, positions: int) -> bool:
        """Whether a new conversation with so long a prompt may come. Nobody may while somebody waits for pages."""
        return not self.parked and self.policy.admits(self.pool.free, self.holdings(), positions)

    def resumes(self, slot: int) -> bool:
        """Whether a conversation that is not in the pool has room there now."""
        return self.policy.resumes(self.pool.free, self.holdings(), self._holding(slot))

    def park(self, slot: int) -> None:
        """Takes all of a conversation's pages; it is next in line after those who wait already."""
        self._let_go(slot)
        self.parked.append(slot)
        self.times_parked += 1

    def make_room(self, slots: Sequence[int]) -> tuple[int, ...]:
        """Sees to it that these can go on by a frame and prompts can be finished; parks the youngest until they can.

        Returns those of `slots` that cannot, since they are parked.
        """
        while True:
            speaking = {slot for slot in slots if slot not in self.parked}
            holdings = self.holdings()
            needed = sum(
                holding.owed(1 if holding.slot in speaking else 0, self.pool.blocks)
                for holding in holdings
                if holding.slot in speaking or not holding.live
            )
            if needed <= self.pool.free:
                break
            self.park(self.policy.victim(holdings))
        return tuple(slot for slot in slots if slot in self.parked)

    def due(self) -> int | None:
        """The parked slot, if any, that can be rebuilt from now on; it is not parked any more."""
        return self.parked.pop(0) if self.parked and self.resumes(self.parked[0]) else None

    def begin(self, live: Sequence[Fill]) -> None:
        """Begins a step with a row for each of `live`."""
        self._promised = sum(self.pool.missing(fill.ring, fill.filled, 1) for fill in live)

    def prepares(self, slot: int) -> bool:
        """Whether a ring for a conversation's next anchor can be had without anybody's reserve."""
        policy, holding = self.policy, self._holding(slot)
        return self._spare() >= holding.wished(policy.reserve_frames, self.pool.blocks)

    def take(self, fill: Fill, count: int, *, spare_only: bool = False) -> int:
        """How many of the next `count` positions of a ring this step can fill; counts their pages as taken.

        spare_only: no page that somebody's reserve wants.
        """
        left = self.pool.free - self._promised
        if spare_only:
            left = min(left, self._spare())
        while count > 0 and self.pool.missing(fill.ring, fill.filled, count) > max(0, left):
            count = max(0, (fill.filled + count - 1) // KEY_BLOCK * KEY_BLOCK - fill.filled)
        self._promised += self.pool.missing(fill.ring, fill.filled, count)
        return count

    def _spare(self) -> int:
        """Free pages that nobody's reserve wants."""
        return self.pool.free - self.policy.owed(self.holdings(), self.policy.reserve_frames)

    def report(self) -> KVPressure:
        """What the router is told."""
        return self.policy.report(self.pool.pages, self.pool.free, self.holdings(), self.parked)

    def holdings(self) -> list[Holding]:
        """Of all conversations that are not parked."""
        return [self._holding(slot) for slot in self._talks if slot not in self.parked]

    def _holding(self, slot: int) -> Holding:
        talk = self._talks[slot]
        anchor_in, kept = None, 0
        if talk.plan is not None and talk.anchor is not None:
            anchor_in, kept = max(0, talk.anchor - talk.frame), talk.prompt.frames + talk.plan.keep
        return Holding(
            slot=slot,
            known=talk.known(talk.fill),
            held=self.pool.held(talk.fill.ring),
            live=talk.live,
            anchor_in=anchor_in,
            kept=kept,
            preparing=0 if talk.upcoming is None else self.pool.held(talk.upcoming.ring),
        )

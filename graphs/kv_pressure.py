"""When pages of the KV cache run short, seen before it happens: who may still come, who should go, who has to wait.

Pure: numbers in, numbers out; time is counted in frames of 80 ms. What a conversation will need is known to the page:
it grows by a frame at a time, and when it anchors, and to what length, is planned (graphs.anchors). So the watermark is
no guess: as long as `owed` for the reserve's frames does not exceed what is free, nobody lacks a page for that long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphs.paging import pages_for
from models.config import FRAMES_PER_S

RESERVE_S = 30.0  # what a mover has to find a place, prefill a journal there and switch; it takes seconds
MIGRATE_ONE = "migrate one"


@dataclass(frozen=True)
class Holding:
    """What one conversation holds in pages, and what it is going to hold.

    known: positions of its ring that are written or, if it is still being prefilled, will be without a frame coming.
    held: pages of that ring now. anchor_in: frames until its next anchor; from then on its ring holds kept positions
    and those since. preparing: pages it holds for that ring already.
    """

    slot: int
    known: int
    held: int
    live: bool = True
    anchor_in: int | None = None
    kept: int = 0
    preparing: int = 0

    def owed(self, frames: int, blocks: int) -> int:
        """Pages it will lack at some time within so many frames, if it is not moved; anchors that can wait for their
        ring (they are filled when the old ring is gone, and are late) are not counted."""
        until = frames if self.anchor_in is None else min(frames, self.anchor_in)
        owed = pages_for(self.known + until, blocks) - self.held
        if self.anchor_in is not None and self.anchor_in < frames:
            owed = max(owed, pages_for(self.kept + frames - self.anchor_in, blocks) - self.held - self.preparing)
        return max(0, owed)

    def wished(self, frames: int, blocks: int) -> int:
        """Pages on top, so that an anchor within so many frames comes in time."""
        if self.anchor_in is None or self.anchor_in > frames:
            return 0
        return max(0, pages_for(self.kept, blocks) - self.preparing)


@dataclass(frozen=True)
class KVPressure:
    """What an engine says about its pages.

    room: conversations that may still be opened, if there are slots. seconds_left: for so long every
    live conversation can go on for certain, if nobody comes and nobody is moved; the reserve at the most. pressure: ""
    or MIGRATE_ONE; then migrate are the slots whose leaving is suggested, within seconds_left, the first one first.
    parked: slots that wait for pages, silent: the most urgent to be moved, and all that they need is their journal.
    """

    pages: int = 0
    free_pages: int = 0
    room: int = 0
    seconds_left: float = RESERVE_S
    pressure: str = ""
    migrate: tuple[int, ...] = ()
    parked: tuple[int, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class PressurePolicy:
    """The watermark. reserve_s: how long every live conversation must be able to go on when a new one is let in.

    typical: positions of a newcomer's prompt, for the room that is reported before anybody has asked.
    """

    blocks: int
    reserve_s: float = RESERVE_S
    typical: int = 256

    @property
    def reserve_frames(self) -> int:
        return round(self.reserve_s * FRAMES_PER_S)

    def owed(self, holdings: Sequence[Holding], frames: int) -> int:
        """Pages that will be lacking within so many frames."""
        return sum(holding.owed(frames, self.blocks) for holding in holdings)

    def admits(self, free: int, holdings: Sequence[Holding], positions: int) -> bool:
        """Whether a conversation of so many positions may be opened without taking from the others' reserve. The first
        one always may: a pool holds one full context at least."""
        if not holdings:
            return True
        return free >= self._claimed(holdings) + self._newcomer(positions)

    def resumes(self, free: int, holdings: Sequence[Holding], parked: Holding) -> bool:
        """Whether a parked conversation's pages are there again, with half a reserve for all: less would have it parked
        again before its rebuild has paid."""
        frames = self.reserve_frames // 2
        others = [holding for holding in holdings if holding.slot != parked.slot]
        return not others or free >= self.owed(others, frames) + parked.owed(frames, self.blocks)

    def victim(self, holdings: Sequence[Holding]) -> int:
        """The slot to park where nobody has been moved in time: one that is not live yet, else the youngest, which is
        rebuilt soonest. Raises ValueError for an empty list."""
        return min((holding for holding in holdings if holding.held), key=lambda h: (h.live, h.known, h.slot)).slot

    def report(self, pages: int, free: int, holdings: Sequence[Holding], parked: Sequence[int] = ()) -> KVPressure:
        """What to tell the router now."""
        short = self._claimed(holdings) - free
        pressing = short > 0 or bool(parked)
        room = max(0, -short) // max(1, self._newcomer(self.typical))
        return KVPressure(
            pages=pages,
            free_pages=free,
            room=max(room, 0 if holdings or parked else 1),
            seconds_left=self._frames_left(free, holdings) / FRAMES_PER_S,
            pressure=MIGRATE_ONE if pressing else "",
            migrate=(*parked, *self._to_migrate(free, holdings)) if pressing else (),
            parked=tuple(parked),
        )

    def _claimed(self, holdings: Sequence[Holding]) -> int:
        frames, blocks = self.reserve_frames, self.blocks
        return sum(holding.owed(frames, blocks) + holding.wished(frames, blocks) for holding in holdings)

    def _newcomer(self, positions: int) -> int:
        return pages_for(positions + self.reserve_frames, self.blocks)

    def _frames_left(self, free: int, holdings: Sequence[Holding]) -> int:
        """The most frames, up to the reserve's, for which nobody lacks a page."""
        enough, short = 0, self.reserve_frames + 1
        if self.owed(holdings, 0) > free:
            return 0
        while short - enough > 1:
            middle = (enough + short) // 2
            if self.owed(holdings, middle) <= free:
                enough = middle
            else:
                short = middle
        return enough

    def _to_migrate(self, free: int, holdings: Sequence[Holding]) -> tuple[int, ...]:
        """Live conversations whose leaving lets the others go on for two reserves: each time the one that is rebuilt
        soonest among those that are enough by themselves; if none is, the one that brings the most. Two, so that when
        they have left, within one, there is a whole one again."""
        frames, blocks = 2 * self.reserve_frames, self.blocks

        def brings(holding: Holding) -> int:
            return holding.held + holding.preparing + holding.owed(frames, blocks) + holding.wished(frames, blocks)

        staying, leaving = [holding for holding in holdings if holding.live], list[int]()
        short = sum(h.owed(frames, blocks) + h.wished(frames, blocks) for h in holdings) - free
        while short > 0 and staying:
            enough = [holding for holding in staying if brings(holding) >= short]
            if enough:
                chosen = min(enough, key=lambda holding: (holding.known, holding.slot))
            else:
                chosen = max(staying, key=lambda holding: (brings(holding), -holding.slot))
            staying.remove(chosen)
            leaving.append(chosen.slot)
            short -= brings(chosen)
        return tuple(leaving)

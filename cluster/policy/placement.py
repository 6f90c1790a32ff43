"""Which replica a conversation goes to: pack, so that whole GPUs empty out, and keep away from the ingress.

Kept as an index that is told of changes, since a look at every replica alone takes as long as all the rest of a grant:
here a choice reads the first entry or two of a sorted list (benchmarks: `python -m benchmarks.placement`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spot:
    """A replica, as far as placement cares. `free` counts slots that nobody holds or may still hold; `room`, never
    more than those, is what the replica itself would still take on under the load that it sees."""

    replica: str
    node: str
    slots: int
    free: int
    room: int
    admitting: bool


class PlacementIndex:
    """The replicas that admit, the fullest first. Equal states place equally: ties go to the smaller name."""

    def __init__(self) -> None:
        self._spots: dict[str, Spot] = {}
        self._with_room: list[tuple[int, str]] = []  # (room, replica), sorted
        self._with_slots: list[tuple[int, str]] = []  # (free, replica), sorted
        self._free = 0
        self._sizes: list[int] = []  # slots of each replica that admits, sorted

    @property
    def free(self) -> int:
        """Slots that nobody holds, on all replicas together: what those who talk have, should they lose theirs."""
        return self._free

    @property
    def admitting(self) -> int:
        return len(self._sizes)

    @property
    def largest(self) -> int:
        """Slots of the largest replica that admits."""
        return self._sizes[-1] if self._sizes else 0

    def get(self, replica: str) -> Spot | None:
        return self._spots.get(replica)

    def put(self, spot: Spot) -> None:
        """A replica has come, or is not what it was."""
        former = self._spots.get(spot.replica)
        if former == spot:
            return
        if former is not None:
            self.drop(spot.replica)
        self._spots[spot.replica] = spot
        if not spot.admitting:
            return
        insort(self._sizes, spot.slots)
        if spot.free > 0:
            insort(self._with_slots, (spot.free, spot.replica))
            self._free += spot.free
        if spot.room > 0:
            insort(self._with_room, (spot.room, spot.replica))

    def drop(self, replica: str) -> None:
        """A replica has gone."""
        spot = self._spots.pop(replica, None)
        if spot is None or not spot.admitting:
            return
        del self._sizes[bisect_left(self._sizes, spot.slots)]
        if spot.free > 0:
            del self._with_slots[bisect_left(self._with_slots, (spot.free, replica))]
            self._free -= spot.free
        if spot.room > 0:
            del self._with_room[bisect_left(self._with_room, (spot.room, replica))]

    def place(self, avoid_node: str, avoid: Container[str] = ()) -> Spot | None:
        """Where a new conversation should live; None when no replica takes one.

        The fullest replica with room comes first: idle ones then stay idle and can be given back. A replica on
        `avoid_node` (the ingress's, whose journal must not die together with the slot) is taken only when no
        other node has room; one in `avoid` never.
        """
        return self._first(self._with_room, avoid_node, avoid, None)

    def place_again(
        self, avoid_node: str, avoid: Container[str], able: Callable[[str], bool], *, emptiest: bool = False
    ) -> Spot | None:
        """Where a conversation that lives already, or did a moment ago, should go: as above, among those replicas that
        are `able` to rebuild one more. Where none has room, the replica's own view of its load yields: late frames are
        better than a lost call. `emptiest`: where it can do the least harm."""
        for ranked in (self._with_room, self._with_slots):
            order = reversed(ranked) if emptiest else ranked
            spot = self._first(order, avoid_node, avoid, able)
            if spot is not None:
                return spot
        return None

    def _first(
        self,
        ranked: Iterable[tuple[int, str]],
        avoid_node: str,
        avoid: Container[str],
        able: Callable[[str], bool] | None,
    ) -> Spot | None:
        near: Spot | None = None
        for _, replica in ranked:
            if replica in avoid or (able is not None and not able(replica)):
                continue
            spot = self._spots[replica]
            if spot.node != avoid_node:
                return spot
            near = near or spot
        return near


def reserve(wanted: int | None, index: PlacementIndex, stranded: int) -> int:
    """Slots that new callers may not have, so that those who talk have somewhere to go when a replica dies.

    `wanted` None: as many as the largest replica has, once there is more than one; a single replica has nobody to
    stand in for it, and holding its slots back would help no one. `stranded` conversations live on replicas that are
    being emptied: they need a slot elsewhere now, whatever is kept for later.
    """
    if wanted is None:
        wanted = index.largest if index.admitting > 1 else 0
    return wanted + stranded

"""Journals on a trunk: cut into parts that live frames can pass, and put together again within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from actors.errors import JournalError
from actors.journal_bytes import MAX_BYTES
from actors.messages import JournalPart

# A frame that is ready waits behind one part at most: 2 ms of a 1 Gbit/s link, of the frame's 80.
PART_BYTES = 256 << 10
MAX_PARTS = -(-MAX_BYTES // PART_BYTES)


def cut(session: str, epoch: int, blob: bytes) -> Iterator[JournalPart]:
    """The parts of `Journal.to_bytes()`, in the order they are to be sent."""
    count = max(1, -(-len(blob) // PART_BYTES))
    for index in range(count):
        yield JournalPart(session, epoch, index, count, blob[index * PART_BYTES : (index + 1) * PART_BYTES])


@dataclass(slots=True)
class _Unfinished:
    count: int
    begun_s: float
    parts: list[bytes] = field(default_factory=list)
    size: int = 0


class PartsBin:
    """Journals of which parts have come. What it holds is bounded by `limit_bytes`; a journal whose next part, or
    whose reader, takes longer than `patience_s` is thrown away when room is needed.

    The other end may die between any two parts, so nothing here waits for anybody.
    """

    def __init__(self, limit_bytes: int = 2 * MAX_BYTES, patience_s: float = 30.0) -> None:
        self._limit_bytes, self._patience_s = limit_bytes, patience_s
        self._unfinished: dict[tuple[str, int], _Unfinished] = {}
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._unfinished)

    def add(self, part: JournalPart, now_s: float) -> bool:
        """Takes the next part of a journal; True when that was the last. Part 0 begins anew.

        Raises JournalError, and forgets the journal, when a part is missing or there is no room for it.
        """
        key = (part.session, part.epoch)
        if part.index == 0:
            self.drop(*key)
            self._unfinished[key] = _Unfinished(part.count, now_s)
        known = self._unfinished.get(key)
        if known is None or part.count != known.count or part.index != len(known.parts):
            self.drop(*key)
            raise JournalError(f"Part {part.index} of {part.count} of a journal came out of order.")
        if self.held_bytes + len(part.data) > self._limit_bytes:
            self._clear_before(now_s - self._patience_s)
            if self.held_bytes + len(part.data) > self._limit_bytes or key not in self._unfinished:
                self.drop(*key)
                raise JournalError("More journals are on their way here than there is room for.")
        known.parts.append(part.data)
        known.size += len(part.data)
        self.held_bytes += len(part.data)
        return len(known.parts) == known.count

    def take(self, session: str, epoch: int) -> bytes:
        """The whole journal, which is then no longer held here. Raises JournalError if it is not complete."""
        known = self._unfinished.get((session, epoch))
        complete = known is not None and len(known.parts) == known.count
        self.drop(session, epoch)
        if known is None or not complete:
            raise JournalError("The journal did not arrive in full.")
        return b"".join(known.parts)

    def drop(self, session: str, epoch: int) -> None:
        """Forgets what there is of a journal."""
        known = self._unfinished.pop((session, epoch), None)
        if known is not None:
            self.held_bytes -= known.size

    def _clear_before(self, begun_s: float) -> None:
        for key, unfinished in list(self._unfinished.items()):
            if unfinished.begun_s < begun_s:
                self.drop(*key)

"""Numbered rows of consecutive frames, as a journal keeps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

from actors.errors import JournalError

Rows = npt.NDArray[np.int16]


class FrameLog:
    """Rows of consecutive frames; the oldest fall out beyond `keep`. Kept as bytes: a row is then a copy of its
    own, where a view would hold the whole batch it came from."""

    def __init__(self, width: int, keep: int | None = None, start: int = 0) -> None:
        self.width = width
        self.keep = keep
        self.start = start  # the frame of the oldest row
        self._rows: deque[bytes] = deque()

    @property
    def next(self) -> int:
        return self.start + len(self._rows)

    def append(self, frame: int, row: Rows) -> bool:
        """Adds the next frame. False if it is there (or has fallen out) already; JournalError if one is missing."""
        if frame < self.next:
            return False
        if frame > self.next:
            raise JournalError(f"frame {frame} came where frame {self.next} was due")
        if row.shape != (self.width,) or row.dtype != np.int16:
            raise JournalError(f"a row of shape {row.shape} {row.dtype} came where [{self.width}] int16 was due")
        self._rows.append(row.astype("<i2", copy=False).tobytes())
        if self.keep is not None and len(self._rows) > self.keep:
            self.drop_before(self.next - self.keep)
        return True

    def drop_before(self, frame: int) -> None:
        while self.start < frame and self._rows:
            self._rows.popleft()
            self.start += 1

    def to_bytes(self) -> bytes:
        """n × width little-endian int16."""
        return b"".join(self._rows)

    def array(self) -> Rows:
        """[n, width] int16, a copy."""
        return np.frombuffer(self.to_bytes(), dtype="<i2").astype(np.int16).reshape(-1, self.width)

    def rows(self, first: int, end: int) -> Iterator[Rows]:
        """Frames `first` … `end` - 1, [width] int16 each, which must be here; near the newest no copy of all."""
        if not self.start <= first <= end <= self.next:
            raise JournalError(f"frames {first} … {end} are not all within {self.start} … {self.next}")
        for frame in range(first, end):
            yield np.frombuffer(self._rows[frame - self.start], dtype="<i2").astype(np.int16)

    def since(self, frame: int) -> Rows:
        """[n, width] int16, a copy of the rows from `frame` on, as far as they are kept."""
        rows = b"".join(islice(self._rows, max(0, frame - self.start), None))
        return np.frombuffer(rows, dtype="<i2").astype(np.int16).reshape(-1, self.width)

    def take_over(self, other: FrameLog, end: int | None = None) -> None:
        """Replaces all there is by what another log holds, before frame `end` if given. Rows are shared, not copied."""
        kept = len(other._rows) if end is None else max(0, end - other.start)
        self.start = other.start
        self._rows = deque(islice(other._rows, kept))
        if self.keep is not None:
            self.drop_before(self.next - self.keep)

    def fill(self, start: int, rows: Rows) -> None:
        """Replaces all there is."""
        self.start = start
        self._rows = deque(row.astype("<i2", copy=False).tobytes() for row in rows)
        if self.keep is not None:
            self.drop_before(self.next - self.keep)

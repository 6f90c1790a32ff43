"""What the next home of a conversation says while the one before it still speaks."""

from __future__ import annotations

import logging
from collections import deque

import numpy as np

from actors.journal import Journal
from actors.messages import FrameOut

log = logging.getLogger(__name__)


class Shadow:
    """What the next home answers while the old one still speaks: compared with the journal, or kept if it is ahead."""

    def __init__(self, journal: Journal) -> None:
        self.checked = 0
        self.differences = 0
        self.ahead: deque[FrameOut] = deque()
        self._journal = journal

    def take(self, frame: FrameOut) -> None:
        """Frames come in order, one may come twice."""
        if not self.ahead or frame.key.frame > self.ahead[-1].key.frame:
            self.ahead.append(frame)
        self.compare()

    def compare(self) -> None:
        """Check what the old home has answered meanwhile."""
        journal = self._journal
        while self.ahead and self.ahead[0].key.frame < journal.next_frame:
            frame = self.ahead.popleft()
            number = frame.key.frame
            if number < journal.agent_codes.start or number < journal.first_row:
                continue
            self.checked += 1
            same = np.array_equal(next(journal.rows.rows(number, number + 1)), frame.journal_row)
            same &= np.array_equal(next(journal.agent_codes.rows(number, number + 1)), frame.codes)
            if not same:
                self.differences += 1
                log.error("session %s: two replicas disagree on frame %d", journal.session, number)

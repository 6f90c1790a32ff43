"""Whether a stage goes before everybody or behind frames: its replica says so, who knows whether one waits for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from actors.promptly import REAL_TIME


class Precedence:
    """The thread of a stage that its calls run on, ranked from outside. For one event loop.

    Prompts, pasts and rebuilds are done in pieces between frames. By the real-time policy (actors.promptly) they would
    keep every frame of the machine waiting, which knows no shares; by niceness, behind frames, a piece of 5 ms takes 50
    where other replicas' frames have the cores, and a frame that finds its own stage at one waits for all of them: it
    has lent its place to whoever goes before the piece. So a piece begins behind frames and goes first from the moment
    that a frame waits for it (as a lock's holder inherits the priority of who waits for the lock). Only the replica
    sees that moment: the stage is at its piece.

    Where threads are not in real time, or must not be ranked, nothing happens: as on a GPU, where the piece is the
    device's work.
    """

    def __init__(self, process: int, thread: int) -> None:
        """thread: a native id, of that process; both as this process sees them."""
        self._thread = thread
        self._yields = False
        self._ranked = sys.platform == "linux" and Path(f"/proc/{process}/task/{thread}").exists() and self._may_rank()

    def behind(self) -> None:
        """What it does from now on is no frame, and none waits for it: by niceness, before newcomers."""
        if self._ranked and not self._yields:
            self._yields = self._set(os.SCHED_OTHER, 0)

    def first(self) -> None:
        """A frame waits for it, or it is at one. Costs nothing where it goes first already."""
        if self._yields:
            self._yields = False
            self._set(os.SCHED_RR, REAL_TIME)

    def _may_rank(self) -> bool:
        """Who could not be raised again is never lowered."""
        try:
            real_time = os.sched_getscheduler(self._thread) == os.SCHED_RR
        except OSError:
            return False
        return real_time and self._set(os.SCHED_RR, REAL_TIME)

    def _set(self, policy: int, priority: int) -> bool:
        try:
            os.sched_setscheduler(self._thread, policy, os.sched_param(priority))
        except OSError:  # it has died, of which its calls tell; or the privilege has gone
            return False
        return True

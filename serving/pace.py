"""How fast a client is heard: in real time, a little ahead of it, and never faster for long."""

from __future__ import annotations

from serving.settings import FRAME_S


class Pace:
    """Credit in frames, earned with time. A client in real time never waits; a faster one gets `ahead_frames` and then
    one a frame's time. One that paused may catch up by `most_frames`, so that a network's hiccup does not leave it
    late for good."""

    def __init__(self, ahead_frames: int, most_frames: int, now_s: float) -> None:
        self._credit = float(ahead_frames)
        self._most = float(most_frames)
        self._at_s = now_s

    def take(self, now_s: float) -> float:
        """Spend one frame's credit and return 0; or the seconds until there is enough of it."""
        self._credit = min(self._most, self._credit + (now_s - self._at_s) / FRAME_S)
        self._at_s = now_s
        if self._credit < 1.0:
            return (1.0 - self._credit) * FRAME_S
        self._credit -= 1.0
        return 0.0

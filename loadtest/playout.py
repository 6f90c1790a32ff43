"""What a listener's player makes of frames that arrive when they arrive: how often it runs dry."""

from __future__ import annotations

from collections.abc import Sequence

FRAME_S = 0.080
PLAYOUT_BUFFER_S = 0.120  # a frame and a half: what a player at the far end of a good line keeps in hand

_ROUNDING_S = 1e-9  # times are sums of floats; a frame that is due now is in time


def underruns(heard_s: Sequence[float], buffer_s: float = PLAYOUT_BUFFER_S) -> list[int]:
    """The frames that were not there when the one before them had been played.

    The player starts `buffer_s` after the first frame is whole and needs one every 80 ms from then on. Once it has run
    dry it falls silent, and starts again `buffer_s` after the late frame. `heard_s`: when each frame was whole.
    """
    late: list[int] = []
    due_s = float("inf")
    for frame, arrived_s in enumerate(heard_s):
        if frame == 0:
            due_s = arrived_s + buffer_s
        elif arrived_s > due_s + _ROUNDING_S:
            late.append(frame)
            due_s = arrived_s + buffer_s
        due_s += FRAME_S
    return late

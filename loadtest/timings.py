"""When things happened in one conversation, and what follows from it. Time is an argument; order is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.playout import PLAYOUT_BUFFER_S, underruns

FRAME_SAMPLES = 1_920
FRAME_S = 0.080  # the model's clock: one frame in, one frame out

# A second of the agent's voice may take this many seconds to arrive before a call no longer counts as live.
REAL_TIME_LIMIT = 1.05


class OutOfOrder(ValueError):
    """Two events came in an order that no conversation has; the measurement is worthless."""


@dataclass
class Timings:
    """Fed by a client with its own monotonic clock, in seconds."""

    opened_s: float
    ready_s: float | None = None
    due_s: list[float] = field(default_factory=list)  # when user frame k should have left
    sent_s: list[float] = field(default_factory=list)  # when it did
    heard_s: list[float] = field(default_factory=list)  # when agent frame k had arrived in full
    heard_samples: int = 0
    ended_s: float | None = None  # when the caller hung up, or found that the line was dead
    _last_s: float = float("-inf")

    def __post_init__(self) -> None:
        self._last_s = self.opened_s

    def on_ready(self, now_s: float) -> None:
        if self.ready_s is not None:
            raise OutOfOrder("the server said twice that it is ready")
        self._forward(now_s)
        self.ready_s = now_s

    def on_sent(self, now_s: float, due_s: float) -> None:
        if self.ready_s is None:
            raise OutOfOrder("a frame was sent before the server was ready")
        self._forward(now_s)
        self.due_s.append(due_s)
        self.sent_s.append(now_s)

    def on_heard(self, now_s: float, samples: int) -> None:
        """`samples` more have arrived; a frame counts once all of its 1,920 are here."""
        if self.ready_s is None:
            raise OutOfOrder("the server spoke before it was ready")
        self._forward(now_s)
        self.heard_samples += samples
        complete = self.heard_samples // FRAME_SAMPLES
        self.heard_s += [now_s] * (complete - len(self.heard_s))

    def on_end(self, now_s: float) -> None:
        if self.ended_s is not None:
            raise OutOfOrder("the call ended twice")
        self._forward(now_s)
        self.ended_s = now_s

    def _forward(self, now_s: float) -> None:
        if now_s < self._last_s:
            raise OutOfOrder(f"the clock went back from {self._last_s:.3f} to {now_s:.3f} s")
        self._last_s = now_s

    @property
    def time_to_ready_s(self) -> float | None:
        """From opening the connection until the prompt is in."""
        return None if self.ready_s is None else self.ready_s - self.opened_s

    @property
    def time_to_first_audio_s(self) -> float | None:
        """From opening the connection until the agent's first whole frame."""
        return self.heard_s[0] - self.opened_s if self.heard_s else None

    @property
    def frame_gaps_ms(self) -> list[float]:
        """Between one agent frame and the next; 80 is the beat."""
        return [(b - a) * 1e3 for a, b in zip(self.heard_s, self.heard_s[1:], strict=False)]

    @property
    def open_gap_ms(self) -> float | None:
        """How long nothing had come when the call ended, if a player would have run dry by then: a server that has
        fallen silent would go unseen otherwise, since a gap ends with a frame."""
        if self.ended_s is None or self.ready_s is None:
            return None
        since_s = self.ended_s - (self.heard_s[-1] if self.heard_s else self.ready_s)
        return since_s * 1e3 if since_s > FRAME_S + PLAYOUT_BUFFER_S else None

    @property
    def underruns(self) -> int:
        """How often a player with a buffer of 120 ms ran dry, a silence that lasted to the call's end included."""
        return len(underruns(self.heard_s)) + (self.open_gap_ms is not None)

    @property
    def reply_lags_ms(self) -> list[float]:
        """From a user frame's leaving to the agent frame of the same number."""
        return [(heard - sent) * 1e3 for sent, heard in zip(self.sent_s, self.heard_s, strict=False)]

    @property
    def generator_lags_ms(self) -> list[float]:
        """How late our own clock was; a figure beside a large one of these says more about us than about the server."""
        return [(sent - due) * 1e3 for due, sent in zip(self.due_s, self.sent_s, strict=True)]

    @property
    def real_time_factor(self) -> float | None:
        """Seconds that a second of the agent's audio took to arrive: 1.00 is live."""
        if len(self.heard_s) < 2:
            return None
        return (self.heard_s[-1] - self.heard_s[0]) / ((len(self.heard_s) - 1) * FRAME_S)

    @property
    def was_real_time(self) -> bool:
        factor = self.real_time_factor
        return factor is not None and factor <= REAL_TIME_LIMIT


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed (nearest rank). Raises ValueError on no values."""
    if not values:
        raise ValueError("no values, no percentile")
    ordered = sorted(values)
    rank = max(1, -(-int(share * 1_000_000) * len(ordered) // 1_000_000))
    return ordered[min(rank, len(ordered)) - 1]

"""Whether a replica can serve one more conversation in time, from how long frames have taken. Pure: time is given.

A replica that cannot keep up must stop admitting before anybody hears it. What is watched is a frame's whole way,
arrival to answer, against its 80 ms: encode, step, decode, windows, neighbours on the machine and all. What one more
would cost is learnt as conversations come and go.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

FRAME_BUDGET_MS = 80.0


@dataclass(frozen=True, slots=True)
class OverloadSettings:
    """budget_ms: what p99 of one more may be predicted at. resume: the share of it below which a replica that had
    closed opens again, so that it does not flap. window_s: how far back p99 looks. least: frames without which nothing
    is said. most_late: the share of late frames above which it closes whatever is predicted. guess: what a conversation
    costs, of an even share of a frame's time, until two counts were seen; measured steps take a tenth to a half.
    """

    budget_ms: float = FRAME_BUDGET_MS
    resume: float = 0.9
    window_s: float = 10.0
    least: int = 50
    most_late: float = 0.02
    guess: float = 0.5


class _Outlook(NamedTuple):
    """What the window says: p99 in ms with `now` conversations, what each one more adds, the share of late frames."""

    p99: float
    now: int
    each: float
    late: float

    def with_(self, conversations: int) -> float:
        return self.p99 + self.each * max(0, conversations - self.now)


@dataclass
class Overload:
    """One replica's. `observe` every answered frame; ask `room` with every report to the router."""

    settings: OverloadSettings = field(default_factory=OverloadSettings)
    closed: bool = False

    def __post_init__(self) -> None:
        self._recent: deque[tuple[float, int, float]] = deque()  # when, conversations, ms
        self._run: deque[float] = deque(maxlen=500)  # ms of the frames since the number of conversations has changed
        self._count = 0
        self._medians: dict[int, float] = {}  # conversations → ms, when there were last so many
        self._owed_s: deque[float] = deque()  # when conversations were lost whose callers are to be let in again

    def observe(self, now_s: float, conversations: int, frame_ms: float) -> None:
        """A frame took so long while so many conversations were live."""
        self._recent.append((now_s, conversations, frame_ms))
        self._forget(now_s)
        if conversations != self._count:
            self._note_run()
            self._run.clear()
            self._count = conversations
        self._run.append(frame_ms)

    def owe(self, now_s: float) -> None:
        """A conversation ended, by no doing of its client's: who dials again within the window is nobody more, and is
        let in whatever the frames say."""
        self._owed_s.append(now_s)

    def came(self) -> None:
        """Somebody new was let in."""
        if self._owed_s:
            self._owed_s.popleft()

    def p99_ms(self, now_s: float) -> float | None:
        """Of the window; None with too few frames to say."""
        self._forget(now_s)
        return _quantile([ms for _, _, ms in self._recent], 0.99) if self._enough else None

    def room(self, now_s: float, conversations: int, free: int) -> int:
        """How many of `free` slots may be given away while `conversations` are here, those not live yet included."""
        while self._owed_s and self._owed_s[0] < now_s - self.settings.window_s:
            self._owed_s.popleft()
        return max(self._bearable(now_s, conversations, free), min(free, len(self._owed_s)))

    def _bearable(self, now_s: float, conversations: int, free: int) -> int:
        settings, outlook = self.settings, self._outlook(now_s)
        if outlook is None:  # nobody has talked of late: the slots are what the operator promises
            self.closed = False
            return free
        limit = settings.budget_ms * (settings.resume if self.closed else 1.0)
        self.closed = outlook.with_(conversations + 1) >= limit or outlook.late > settings.most_late
        if self.closed:
            return 0
        return next((room for room in range(free) if outlook.with_(conversations + room + 1) >= limit), free)

    def _outlook(self, now_s: float) -> _Outlook | None:
        p99 = self.p99_ms(now_s)
        if p99 is None:
            return None
        self._note_run()
        times = [ms for _, _, ms in self._recent]
        median = _quantile(times, 0.5)
        now = max(count for _, count, _ in self._recent)  # whose frames make the tail
        # The tail grows as the middle does: what delays a frame once in a hundred delays longer frames longer.
        each = self._cost_of_one(now, median) * p99 / median if median > 0 else 0.0
        late = sum(ms > self.settings.budget_ms for ms in times) / len(times)
        return _Outlook(p99, now, each, late)

    @property
    def _enough(self) -> bool:
        return len(self._recent) >= self.settings.least

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - self.settings.window_s:
            self._recent.popleft()

    def _note_run(self) -> None:
        if len(self._run) >= self.settings.least:
            self._medians[self._count] = _quantile(list(self._run), 0.5)

    def _cost_of_one(self, now: int, median: float) -> float:
        """ms that a conversation adds: the slope through what was measured at other counts, a guess with no other."""
        if len(self._medians) < 2:
            return self.settings.guess * median / max(1, now)
        counts, times = list(self._medians), list(self._medians.values())
        middle, level = sum(counts) / len(counts), sum(times) / len(times)
        spread = sum((count - middle) ** 2 for count in counts)
        slope = sum((n - middle) * (ms - level) for n, ms in self._medians.items()) / spread
        return min(max(slope, 0.0), median / max(1, now))


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]

"""The witness's own clock: when this process was too late to notice anything, whatever the system did meanwhile."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.timings import percentile

EVERY_S = 0.01
_FIRST, _ORDINARY = -10, 0  # niceness
_REAL_TIME = 1  # the lowest there is
LATE_S = 0.02  # what `personaplex loadtest` allows its generators: a quarter of the 80 ms beat


@dataclass(frozen=True, slots=True)
class Stall:
    """What came between these two times was noticed at the second one, and nothing was said meanwhile."""

    from_s: float
    until_s: float

    @property
    def seconds(self) -> float:
        return self.until_s - self.from_s

    def within_s(self, from_s: float, until_s: float) -> float:
        """How much of it lies between these two times."""
        return max(0.0, min(self.until_s, until_s) - max(self.from_s, from_s))


class Pulse:
    """Wants to wake every 10 ms and notes how late it was: an event loop that is late for this is late for a frame."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.stalls: list[Stall] = []  # of more than LATE_S
        self._lates_s: list[float] = []
        self._clock = clock

    async def beat(self) -> None:
        """Until cancelled."""
        while True:
            due_s = self._clock() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self.woke(due_s, self._clock())

    def woke(self, due_s: float, at_s: float) -> None:
        self._lates_s.append(max(0.0, at_s - due_s))
        if at_s - due_s > LATE_S:
            self.stalls.append(Stall(due_s, at_s))

    @property
    def p99_ms(self) -> float:
        """Of how late it woke."""
        return percentile(self._lates_s, 0.99) * 1e3 if self._lates_s else 0.0


def wake_first() -> bool:
    """This process's thread goes before others that want its core, where it may (CAP_SYS_NICE): whoever measures by a
    clock has to hear it strike, also while a replacement is loading beside it, and is no later for those who carry
    frames than a machine of its own would make it. False where it may not."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
        if sys.platform == "linux":
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_REAL_TIME))
    except PermissionError:
        return False
    return True


def wake_as_before(niceness: int) -> None:
    """After `wake_first`, in a process that goes on to do something else."""
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, niceness)


def ordinary(*command: str) -> tuple[str, ...]:
    """The command so that what it starts has the priority it would have without us. A prefix and no `preexec_fn`, for
    which Python would copy this process's memory map, and all callers would wait."""
    above = _ORDINARY - os.getpriority(os.PRIO_PROCESS, 0)
    if above > 0:
        command = ("nice", "-n", str(above), *command)
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_RR:
        command = ("chrt", "--other", "0", *command)
    return command


def longest_s(stalls: Sequence[Stall]) -> float:
    return max((stall.seconds for stall in stalls), default=0.0)

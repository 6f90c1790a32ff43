"""Processes that carry frames go first, where they may: the other half of actors.gently."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

NICENESS = -10  # ten times the weight of an ordinary thread, by Linux' table
LAST = 5  # as what loads: actors.gently
REAL_TIME = 1  # the lowest priority there is of real time: watchdogs and the kernel's own threads still go first


def promptly(*, spins: bool = False) -> bool:
    """For a process that has loaded and is about to carry frames: nothing of its own keeps them waiting, nor, as far as
    it may, do others that want the same cores.

    What has been loaded by now is left out of every later search for garbage: among a stage's 350,000 objects one takes
    0.3 s, an ingress' 120,000 take 0.08 s, and all frames of all conversations wait for it. It is not searched a last
    time, either: that takes as long, and of a stage's 500 MB it gave nothing back.

    And this process's threads, and those they start, go first, as those of telephone exchanges do: by the policy
    SCHED_RR. A newcomer's interpreter and its imports keep a core busy at ordinary priority for seconds, before any
    code of ours could lower them. Niceness shares out the core on which a frame happens to wait; of two cores it
    chooses neither, and frames of high priority queue on one while a newcomer has the other
    (scripts/measure_newcomers.py). A real-time thread that wakes up is put where it goes first. Linux keeps a twentieth
    of each core for all others.

    `spins`: it waits for its GPU in a loop, and would keep all others from that core: it is raised by niceness alone,
    as every process is where real time is refused. Either is a privilege (CAP_SYS_NICE, or limits `rtprio` of 1 and
    `nice` of 30 and more): returns False, and has changed no priority, where this process has neither; frames then take
    their turn.
    """
    gc.freeze()
    if sys.platform != "linux":
        return False
    raised = False
    for thread in Path("/proc/self/task").iterdir():
        try:
            raised |= _raise(int(thread.name), spins)
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return raised


def at_leisure(process: int) -> None:
    """For a process that carries frames no more and is about to end, this one or another of this user: all its threads
    take their turns again, behind others'.

    The last of a process's threads gives its memory back, which takes a stage 46 to 84 ms of a core, by its own
    priority: all frames of a machine with two cores wait while three stages of a replica that has moved out end.
    """
    if sys.platform != "linux":
        return
    try:
        threads = [int(thread.name) for thread in Path(f"/proc/{process}/task").iterdir()]
    except OSError:  # it has ended
        return
    for thread in threads:
        try:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, max(LAST, os.getpriority(os.PRIO_PROCESS, thread)))
        except OSError:  # this one has ended, or is none of ours
            continue


def _raise(thread: int, spins: bool) -> bool:
    """Whether it goes first now. Raises ProcessLookupError."""
    raised = False
    try:
        if os.getpriority(os.PRIO_PROCESS, thread) > NICENESS:
            os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
        raised = True
        if not spins:
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(REAL_TIME))
    except PermissionError:  # no privilege, or a kernel whose containers have no share of real time
        pass
    return raised

"""Processes that carry frames go first, where they may: the other half of actors.gently."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NICENESS = -10  # ten times the weight of an ordinary thread, by Linux' table


def promptly() -> bool:
    """From now on this process's threads, and those they start, come before others that want the same cores.

    A newcomer's interpreter and its imports run at ordinary priority for seconds, before any code of ours could lower
    them; where it shares cores with replicas that serve, frames would be late for it. What carries frames takes little
    and is in a hurry, so it is raised instead. That is a privilege (CAP_SYS_NICE, or a `nice` limit of 30 and more):
    returns False, and has changed nothing, where this process does not have it; frames then take their turn.
    """
    if sys.platform != "linux":
        return False
    for thread in Path("/proc/self/task").iterdir():
        try:
            if os.getpriority(os.PRIO_PROCESS, int(thread.name)) > NICENESS:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICENESS)
        except PermissionError:
            return False
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return True

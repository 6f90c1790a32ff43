"""The witness goes first, and what it starts does not."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: a test that failed to come back would take everybody's core.
PROGRAM = """
import os, subprocess, sys
from loadtest.chaos.pulse import ordinary, wake_as_before, wake_first

SAY = "import os; print((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))"

def own():
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

def child():
    return eval(subprocess.run(ordinary(sys.executable, "-c", SAY), capture_output=True, text=True, check=True).stdout)

before = own(), child()
first = wake_first()
awake = own(), child()
wake_as_before(before[0][1])
print((before, first, awake, (own(), child())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a priority of its own")
def test_what_the_witness_starts_has_the_priority_that_it_would_have_without_it() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    before, first, awake, after = eval(said)
    assert before[0] == before[1]
    assert awake[1] == before[1]
    assert after == before
    assert (awake[0] != before[0]) == first, "where it may, it goes first"

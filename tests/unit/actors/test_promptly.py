"""Priority of what carries frames: raised for all threads where it may be, and nothing happens where it may not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from actors.gently import NICENESS as GENTLE
from actors.promptly import NICENESS

# In a process of its own: what is raised here could not be lowered again without a privilege.
PROGRAM = """
import gc, os, threading
from actors.gently import gently
from actors.promptly import promptly

def standing(thread=None):
    native = thread.native_id if thread else threading.get_native_id()
    return os.sched_getscheduler(native), os.getpriority(os.PRIO_PROCESS, native)

def all_threads():
    return {standing(thread) for thread in threading.enumerate()}

def refuse(*_): raise PermissionError

before, stop = all_threads(), threading.Event()
early = threading.Thread(target=stop.wait)
early.start()
for name in DENIED:
    setattr(os, name, refuse)
raised = promptly(spins=SPINS)
frozen = gc.get_freeze_count()
late = threading.Thread(target=stop.wait)
late.start()
after = all_threads()
loading = gently(standing) if not DENIED else None
stop.set()
print((before, raised, after, loading, frozen))
"""
NOBODY = ()
REAL_TIME, NICE = "sched_setscheduler", "setpriority"


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a priority of its own")
@pytest.mark.parametrize(
    ("denied", "spins"),
    [(NOBODY, False), (NOBODY, True), ((REAL_TIME,), False), ((REAL_TIME, NICE), False), ((NICE,), True)],
)
def test_all_threads_are_raised_or_none(denied: tuple[str, ...], spins: bool) -> None:
    program = PROGRAM.replace("DENIED", str(denied)).replace("SPINS", str(spins))
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, raised, after, loading, frozen = eval(said)
    assert frozen > 1000, "what was loaded is not searched for garbage again"
    if not raised:  # nor, perhaps, may this test
        assert after == before
        return
    assert NICE not in denied
    if after == {(os.SCHED_RR, NICENESS)}:
        assert not spins, "nobody waits behind a loop that waits for a GPU"
        assert REAL_TIME not in denied
    else:
        assert after == {(os.SCHED_OTHER, NICENESS)}
    if loading is not None:
        assert loading == (os.SCHED_OTHER, GENTLE), "what loads yields all the same"

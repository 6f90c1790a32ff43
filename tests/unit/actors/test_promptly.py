"""Priority of what carries frames: raised for all threads where it may be, and nothing happens where it may not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from actors.gently import NICENESS as GENTLE
from actors.promptly import NICENESS

# In a process of its own: what is raised here could not be lowered again without a privilege.
PROGRAM = """
import gc, os, threading
from pathlib import Path
from actors.gently import gently
from actors.promptly import promptly

def all_threads():
    return {os.getpriority(os.PRIO_PROCESS, int(each.name)) for each in Path("/proc/self/task").iterdir()}

before, stop = all_threads(), threading.Event()
early = threading.Thread(target=stop.wait)
early.start()
if DENIED:
    def refuse(*_): raise PermissionError
    os.setpriority = refuse
raised = promptly()
frozen = gc.get_freeze_count()
late = threading.Thread(target=stop.wait)
late.start()
after = all_threads()
loading = None if DENIED else gently(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
stop.set()
print((before, raised, after, loading, frozen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a niceness of its own")
@pytest.mark.parametrize("denied", [False, True])
def test_all_threads_are_raised_or_none(denied: bool) -> None:
    program = PROGRAM.replace("DENIED", str(denied))
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, raised, after, loading, frozen = eval(said)
    assert frozen > 1000, "what was loaded is not searched for garbage again"
    if raised:
        assert not denied
        assert after == {NICENESS}
        assert loading == GENTLE, "what loads yields all the same"
    else:
        assert after == before

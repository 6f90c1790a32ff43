"""Work that may take its time: done on a thread that yields the processor to whoever needs it within 80 ms."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

# A third of the weight of a thread that carries frames, by Linux' table. Not less: until the newcomer is there, there
# is no reserve. On a machine with cores to spare it costs nothing.
NICENESS = 5


def gently(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises; the caller waits.

    Loading a stage takes seconds of a core: imports, weights, compiled code, a self-test. Where newcomers share cores
    with replicas that serve (a replacement on the same machine, CPU serving), frames of the living would be late for
    it. On Linux niceness belongs to a thread, and without privileges it only ever rises: so the work gets a thread of
    its own, which ends with it, and the frames that come later run on threads that were never lowered.

    Nor is it interrupted by Python's search for garbage, a fifth of an import's time; and what it has loaded, which
    stays, is left out of every later one.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        if sys.platform == "linux":  # elsewhere it would be the whole process, for good
            if os.sched_getscheduler(0) == os.SCHED_RR:  # of a process that carries frames, too
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICENESS, os.nice(0)))
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where it was asked for
            outcome.set_exception(error)

    worker = threading.Thread(target=run, name="gently")
    collects = gc.isenabled()
    gc.disable()
    try:
        worker.start()
        worker.join()
    finally:
        gc.freeze()  # before it may search again: all that is new would be searched at once, in 0.2 s
        if collects:
            gc.enable()
    return outcome.result()

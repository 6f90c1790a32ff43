"""A stage's thread, ranked by its replica: behind frames until one waits for it. In a process of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from actors.precedence import Precedence
from actors.promptly import LAST, NICENESS, at_leisure
from actors.stage_link import StageGone, StageLink
from graphs.stages import FrameKey, StageBatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a priority of its own")

THREAD = """
import sys, threading
from actors.promptly import promptly
promptly(spins=SPINS)
print(threading.get_native_id(), flush=True)
sys.stdin.read()
"""
STAGE = """
import os, sys, threading
from actors.promptly import promptly
from actors.stage_link import StageServer

class Stage:
    def standing(self):
        thread = threading.get_native_id()
        return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)

    def rebuild(self, budget_s):  # says how it went at its beginning and, once it is told so, at its end
        before = self.standing()
        print("at it", flush=True)
        sys.stdin.readline()
        return before, self.standing()

    def step(self, batch):
        return self.standing()

promptly()
server = StageServer(Stage())
print(server.address, flush=True)
server.serve()
"""
FIRST, BEHIND = (os.SCHED_RR, NICENESS), (os.SCHED_OTHER, NICENESS)


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def standing(thread: int) -> tuple[int, int]:
    return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)


@pytest.mark.parametrize("spins", [False, True])
def test_only_a_thread_in_real_time_changes_places(spins: bool) -> None:
    with running(THREAD.replace("SPINS", str(spins))) as process:
        thread = int(said(process))
        before = standing(thread)
        precedence = Precedence(process.pid, thread)
        precedence.behind()
        assert standing(thread) == (BEHIND if before == FIRST else before)
        precedence.first()
        assert standing(thread) == before
        assert before != FIRST or not spins


def test_who_could_not_be_raised_again_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(THREAD.replace("SPINS", "False")) as process:
        thread = int(said(process))
        before = standing(thread)

        def refused(*_: object) -> None:
            raise PermissionError

        with monkeypatch.context() as patched:
            patched.setattr(os, "sched_setscheduler", refused)
            precedence = Precedence(process.pid, thread)
        precedence.behind()
        assert standing(thread) == before


def test_a_thread_of_another_process_is_left_alone() -> None:
    """As one would be whose number means somebody else here, in another container."""
    with running(THREAD.replace("SPINS", "False")) as process:
        thread = int(said(process))
        before = standing(thread)
        Precedence(os.getpid(), thread).behind()
        assert standing(thread) == before


def test_one_that_has_died_troubles_nobody() -> None:
    with running(THREAD.replace("SPINS", "False")) as process:
        precedence = Precedence(process.pid, int(said(process)))
    precedence.behind()
    precedence.first()


def test_a_process_that_is_about_to_end_stands_last() -> None:
    with running(THREAD.replace("SPINS", "False")) as process:
        thread = int(said(process))
        at_leisure(process.pid)
        assert standing(thread) == (os.SCHED_OTHER, LAST)
        at_leisure(process.pid)
        assert standing(thread) == (os.SCHED_OTHER, LAST)
    at_leisure(process.pid)  # nor does it matter that it is gone


async def test_a_stage_that_is_left_in_the_middle_of_a_piece_stands_last() -> None:
    with running(STAGE) as process:
        link = await StageLink.to(said(process))
        await link.call("step", StageBatch((), np.zeros((0, 8), np.int16)))
        piece = asyncio.create_task(link.call("rebuild", 0.1, behind=True))
        assert await asyncio.to_thread(said, process) == "at it"
        link.close()
        with pytest.raises(StageGone):
            await piece
        assert standing(process.pid) == (os.SCHED_OTHER, LAST), "and the end of its call has not raised it again"


async def test_a_piece_goes_behind_frames_until_one_waits_for_it() -> None:
    with running(STAGE) as process:
        assert process.stdin is not None
        link = await StageLink.to(said(process))
        empty = StageBatch((), np.zeros((0, 8), np.int16))
        raised = await link.call("step", empty)  # by now the stage has said who answers
        piece = asyncio.create_task(link.call("rebuild", 0.1, behind=True))
        assert await asyncio.to_thread(said, process) == "at it"
        link.hurry()
        process.stdin.write("go on\n")
        process.stdin.flush()
        began, ended = await piece
        assert ended == raised, "a frame waited for it"
        assert await link.call("step", StageBatch((FrameKey("a", 1, 0),), np.zeros((1, 8), np.int16))) == raised
        if raised == FIRST:  # nor may this test, perhaps
            assert began == BEHIND
        link.close()


async def test_a_stage_that_was_hurried_by_nobody_goes_first_again_afterwards() -> None:
    with running(STAGE) as process:
        link = await StageLink.to(said(process))
        empty = StageBatch((), np.zeros((0, 8), np.int16))
        raised = await link.call("step", empty)
        assert await link.call("step", empty, behind=True) == (BEHIND if raised == FIRST else raised)
        assert await link.call("step", empty) == raised
        link.close()

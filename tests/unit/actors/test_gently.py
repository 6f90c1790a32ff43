"""Work on a thread that yields: its result and its errors come back, and nobody else's priority is changed."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.gently import NICENESS, gently

linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux a thread has a niceness of its own")


def niceness() -> int:
    """Of the thread that asks."""
    stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[16])


def test_the_result_and_the_error_come_back() -> None:
    assert gently(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 // 0)


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """What was frozen here may be garbage for the tests that come after."""
    yield
    gc.unfreeze()


def test_it_is_not_interrupted_to_search_for_garbage_and_everybody_else_is_again() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    loaded = gently(lambda: [[] for _ in range(1000)] if not gc.isenabled() else [])
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(loaded) > before, "what it has loaded is not searched later"
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 // 0)
    assert gc.isenabled()


@linux
def test_it_yields_and_whoever_waits_for_it_does_not() -> None:
    before = niceness()
    assert gently(niceness) == max(NICENESS, before)
    assert niceness() == before
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@linux
def test_a_stage_is_built_gently_and_works_at_full_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors import stage_build
    from actors.engine_actor import EngineShell
    from actors.stage_config import StageConfig

    at: list[int] = []
    monkeypatch.setattr(stage_build, "build_engine", lambda _config: at.append(niceness()) or ("stage", "description"))
    monkeypatch.setattr(stage_build, "use_threads", lambda _config: at.append(niceness()))
    EngineShell(StageConfig())
    assert at == [max(NICENESS, niceness()), niceness()]

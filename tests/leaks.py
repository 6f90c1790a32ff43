"""What a test may leave behind: nothing. Counts sockets and processes of this test run by way of /proc.

On a system without /proc (macOS) the counts are empty, and the checks pass.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MARKER = "PERSONAPLEX_TEST_RUN"  # inherited by every process of a run, Ray's daemons included
PROC = Path("/proc")


def open_sockets() -> set[str]:
    """The inodes of this process's open sockets, e.g. {"socket:[4711]"}."""
    found: set[str] = set()
    for descriptor in _entries(PROC / "self" / "fd"):
        try:
            target = os.readlink(descriptor)
        except OSError:  # closed while we looked
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def descendants(marker: str) -> dict[int, str]:
    """Processes that were started with `marker` in their environment, wherever they hang in the process tree.

    Ray's workers are reparented when their raylet dies, so a walk down from this process would miss those
    that matter most. Returns pid → command line, without this process and without zombies.
    """
    wanted = f"{MARKER}={marker}".encode()
    found: dict[int, str] = {}
    for folder in _entries(PROC):
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if wanted not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # gone while we looked, or another user's
            continue
        if command:  # a zombie has none
            found[int(folder.name)] = command
    return found


async def tasks(before: set[asyncio.Task[Any]]) -> str:
    """This loop's tasks that run, but for this one and those that ran `before`: a line each."""
    for _ in range(3):  # what was cancelled in the last teardown gets its turns to end
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    return "\n".join(f"  {task!r}"[:200] for task in left if not task.done())


def settled(look: Callable[[], T], within_s: float) -> T:
    """The first empty answer of `look`, or its last one after `within_s`: what ends needs a moment to be gone."""
    deadline = time.monotonic() + within_s
    while True:
        seen = look()
        if not seen or time.monotonic() >= deadline:
            return seen
        time.sleep(0.05)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []

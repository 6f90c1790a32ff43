"""Leak checks for every test: no task, socket, child process or Ray cluster outlives the test that made it.

Also imported on GPU machines that have pytest and torch alone, so nothing else is imported at the top.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import inspect
import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import pytest

from tests import leaks

RUN = uuid4().hex
os.environ[leaks.MARKER] = RUN
# Before torch is imported: its threads spin at barriers; beside other work two of them took 15 times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A worker of Ray's needs some seconds to follow its raylet into the grave.
PROCESS_GRACE_S = 15.0
SOCKET_GRACE_S = 2.0


def pytest_configure() -> None:
    """How long an example takes says how much else this machine has to do, and nothing about the code."""
    if importlib.util.find_spec("hypothesis") is not None:
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]
        settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=slow)
        settings.load_profile("any machine")


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        # First in, last out: it looks when the test's own fixtures have been torn down.
        item.fixturenames.insert(0, "no_task_left")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch  # most test runs select none of these

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def _ray_is_up() -> bool:
    ray: Any = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


@pytest.fixture(autouse=True)
def no_socket_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A socket opened by a test is closed by it. A Ray driver keeps channels of its own open, so not beside Ray."""
    before = leaks.open_sockets()
    yield
    if "ray" in sys.modules:
        return
    if leaks.open_sockets() - before:
        gc.collect()
    left = leaks.settled(lambda: leaks.open_sockets() - before, SOCKET_GRACE_S)
    if left:
        pytest.fail(f"{request.node.nodeid} left {len(left)} open socket(s): {sorted(left)}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def no_process_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a module, whose fixtures may hold a cluster for all its tests, nothing it started runs any more."""
    before = set(leaks.descendants(RUN))
    yield
    if _ray_is_up():
        pytest.fail(f"{request.node.nodeid} left Ray running: ray.shutdown() belongs into its fixture", pytrace=False)

    def left() -> dict[int, str]:
        return {pid: what for pid, what in leaks.descendants(RUN).items() if pid not in before}

    processes = leaks.settled(left, PROCESS_GRACE_S)
    if processes:
        listed = "\n".join(f"  {pid} {what[:160]}" for pid, what in sorted(processes.items()))
        pytest.fail(f"{request.node.nodeid} left processes behind:\n{listed}", pytrace=False)


@pytest.fixture
async def no_task_left(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = await leaks.tasks(before)
    if left:
        pytest.fail(f"{request.node.nodeid} left tasks running:\n{left}", pytrace=False)


@pytest.fixture(autouse=True)
def unit_tests_need_no_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """A unit test drives plain classes: one that starts Ray belongs to tests/cluster or tests/integration."""
    yield
    if "tests/unit/" in request.node.nodeid and _ray_is_up():
        pytest.fail(f"{request.node.nodeid} is a unit test and started Ray", pytrace=False)

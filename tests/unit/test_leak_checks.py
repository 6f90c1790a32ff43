"""The leak checks of tests/conftest.py catch what they are there to catch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = "from tests.conftest import *\n"
INI = "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"

LEAKY = {
    "task": """
        import asyncio
        async def test_it():
            loop = asyncio.get_running_loop()
            loop.keep = asyncio.create_task(asyncio.sleep(60))
    """,
    "tasks": """
        import asyncio
        from tests.virtual_time import in_virtual_time
        @in_virtual_time
        async def test_it():
            loop = asyncio.get_running_loop()
            loop.keep = asyncio.create_task(asyncio.sleep(60))
    """,
    "open socket": """
        import socket
        KEPT = []
        def test_it():
            KEPT.append(socket.socket())
    """,
    "processes": """
        import subprocess
        KEPT = []
        def test_it():
            KEPT.append(subprocess.Popen(["sleep", "3"]))
    """,
}


@pytest.mark.parametrize("what", sorted(LEAKY))
def test_a_leak_fails_the_test_that_made_it(
    what: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeini(INI)
    pytester.makeconftest(CONFTEST + "from tests import conftest\nconftest.PROCESS_GRACE_S = 0.2\n")
    pytester.makepyfile(LEAKY[what])
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"*left*{what}*"])


def test_a_clean_test_passes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pytester.makeini(INI)
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import asyncio, socket, subprocess
        async def test_task():
            await asyncio.create_task(asyncio.sleep(0))
        def test_socket():
            socket.socket().close()
        def test_process():
            subprocess.run(["true"], check=True)
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)

"""Starting a server to measure: what stands in for it says what `personaplex serve` says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from loadtest.server import ServerDidNotStart, served

# Whoever started this run in a shell's background had it ignore Ctrl-C, and so would all that it starts.
HEEDS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
UP = f"""
{HEEDS}
import os, time
try:
    print("Talk at http://127.0.0.1:1234/", flush=True)
    print("Ctrl-C stops it." if os.environ["PERSONAPLEX_SLOTS"] == "3" else "", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open(os.environ["PERSONAPLEX_CHECKPOINT"], "w").write("as Ctrl-C does")
"""


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_it_is_there_with_its_settings_until_the_block_is_left(tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with served({"slots": 3, "checkpoint": stopped}, python(UP)) as server:
        assert server.url == "http://127.0.0.1:1234"
        os.kill(server.process, 0)
    assert stopped.read_text() == "as Ctrl-C does"
    with pytest.raises(ProcessLookupError):
        os.kill(server.process, 0)


def test_one_that_ends_says_why() -> None:
    with (
        pytest.raises(ServerDidNotStart, match=r"(?s)ended before it was up.*no such checkpoint"),
        served({}, python("import sys; sys.exit('no such checkpoint')")),
    ):
        pass


def test_one_that_is_not_up_in_time_is_stopped() -> None:
    started_s = time.monotonic()
    with (
        pytest.raises(ServerDidNotStart, match=r"(?s)not up within 3 s.*loading"),
        served({}, python(f"{HEEDS}\nimport time\nprint('loading', flush=True)\ntime.sleep(60)"), start_s=3),
    ):
        pass
    assert time.monotonic() - started_s < 30  # not the minute it wanted

"""Ctrl-C, once or on top of itself, stops `personaplex serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PROGRAM = """
import os, signal
from serving.cli.serve import catch_stop_signals
wait = catch_stop_signals()
print("waiting", flush=True)
wait()
for _ in range(200):  # while it stops
    os.kill(os.getpid(), signal.SIGINT)
print("stopped", flush=True)
"""


def test_a_storm_of_signals_stops_once_and_cleanly() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as output:
        assert output.readline() == "waiting\n"
        for number in [signal.SIGINT, signal.SIGTERM] * 100:
            try:
                os.kill(process.pid, number)
            except ProcessLookupError:  # it has stopped already
                break
        assert output.read() == "stopped\n"
        assert process.wait(30) == 0

"""`personaplex serve` in a process of its own, for as long as something is measured on it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

CLI = (sys.executable, "-m", "serving.cli.main")
START_S, STOP_S = 180.0, 60.0
_KEPT_CHARACTERS = 5000  # of what it said, where it did not start
_URL, _UP = re.compile(r"http://[\w.:]+"), "Ctrl-C"


class ServerDidNotStart(RuntimeError):
    """It ended, or was not ready in time; the end of what it said is in here."""


@dataclass(frozen=True, slots=True)
class Server:
    url: str  # without a slash at its end
    process: int


@contextmanager
def served(
    settings: dict[str, object], command: Sequence[str] = (*CLI, "serve", "--port", "0"), start_s: float = START_S
) -> Iterator[Server]:
    """A server with these settings (ServeSettings' names) on a free port; stopped as Ctrl-C stops it, killed where it
    takes longer than STOP_S. Raises ServerDidNotStart."""
    environment = os.environ | {f"PERSONAPLEX_{name.upper()}": str(value) for name, value in settings.items()}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        said: list[str] = []
        heard = threading.Event()  # that it is up, or has ended
        reading = threading.Thread(target=_read, args=(process, said, heard))
        reading.start()
        try:
            in_time = heard.wait(start_s)
            words = "".join(said)
            url = _URL.search(words)
            if url is None or _UP not in words:
                how = "ended before it was up" if in_time else f"was not up within {start_s:g} s"
                raise ServerDidNotStart(f"the server {how}; it said:\n{words[-_KEPT_CHARACTERS:]}")
            yield Server(url.group().rstrip("/"), process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
            finally:
                process.kill()
                reading.join()


def _read(process: subprocess.Popen[str], said: list[str], heard: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if _UP in line:
            heard.set()
    heard.set()

"""What an installation compiles is what a replica's stages need: after it they start without compiling anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.demo_checkpoint import write_demo_checkpoint
from tests.small_checkpoint import LM, MIMI

pytest.importorskip("numba", reason="without numba there is nothing to compile")

_SECOND = """
import sys
from numba.core import event
from actors.compile_ahead import compile_ahead
with event.install_recorder("numba:compile") as compiled:
    compile_ahead(sys.argv[1])
names = {str(each.data["dispatcher"].py_func.__qualname__) for _, each in compiled.buffer}
print(len(compiled.buffer), sorted(names))
"""


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_demo_checkpoint(folder, LM, MIMI)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        command = [sys.executable, "-c", _SECOND, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.startswith("0 "), done.stdout

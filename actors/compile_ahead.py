"""Compiles the CPU's kernels before anybody waits for them: `python -m actors.compile_ahead`, once an installation.

numba keeps what it compiled beside the source. Without this, the first server does it while it starts, and three
replicas started at once on one machine do it nine times, side by side.
"""

from __future__ import annotations

import sys
import time

from actors.stage_build import build_decoder, build_encoder, build_engine
from actors.stage_config import StageConfig


def compile_ahead(checkpoint: str = "demo") -> float:
    """Builds every stage once on a CPU, as a replica does, and lets go of it. Returns the seconds it took.

    Raises models.checkpoint.CheckpointError.
    """
    started = time.monotonic()
    config = StageConfig(checkpoint=checkpoint)
    for number, build in enumerate((build_encoder, build_engine, build_decoder), 1):
        build(config)
        print(
            f"\rkernels of {number}/3 stages, {time.monotonic() - started:.0f} s ", end="", file=sys.stderr, flush=True
        )
    print(file=sys.stderr)
    return time.monotonic() - started


if __name__ == "__main__":
    compile_ahead()

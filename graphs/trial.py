"""What became of trying somebody else's kernel beside our own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

MARGIN = 1.2  # times faster than ours: what a busy machine does not feign
_TRIES = 15


@dataclass(frozen=True)
class Trial:
    """error: relative, of the rows' norm; times in ms of what a step with all slots live calls."""

    name: str
    error: float
    bound: float
    stable: bool
    ours_ms: float
    theirs_ms: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # and not for NaN

    @property
    def pays(self) -> bool:
        return self.right and self.stable and self.theirs_ms * MARGIN <= self.ours_ms

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        bits = "stable" if self.stable else "bits depend on company"
        return (
            f"{self.name}: error {self.error:.4f} of {self.bound:g} allowed ({verdict}), {bits}, "
            f"{self.theirs_ms:.3f} ms beside our {self.ours_ms:.3f}"
        )


def median_ms(run: Callable[[], object], finish: Callable[[], object] = lambda: None) -> float:
    """finish: waits for what `run` has begun."""
    for _ in range(3):
        run()
    finish()
    took = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        run()
        finish()
        took.append(time.perf_counter() - started)
    return sorted(took)[_TRIES // 2] * 1e3

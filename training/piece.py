"""A piece of a run: so many minutes of steps, stopped cleanly by the clock or by a signal, saved as it goes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import torch


class Piece:
    """Tells a training loop when to save and when to stop."""

    def __init__(self, minutes: float, *, save_every_s: float = 180.0, clock: Callable[[], float] = time.monotonic):
        """minutes: how long this piece may run; 0 for no limit."""
        self._clock = clock
        self._started = self._saved = clock()
        self._limit_s = minutes * 60.0 if minutes > 0 else float("inf")
        self._save_every_s = save_every_s
        self._asked = False

    def listen(self) -> None:
        """SIGTERM and SIGINT end the piece after the current step, with a save."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self._asked = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    def over(self) -> bool:
        return self._asked or self.elapsed_s >= self._limit_s

    def due(self) -> bool:
        """Whether it is time to save; counts from the last time this said yes."""
        if self._clock() - self._saved < self._save_every_s:
            return False
        self._saved = self._clock()
        return True


def start(minutes: float, threads: int) -> tuple[Piece, torch.device]:
    """A piece that signals end, and the device: CUDA if there is any, else so many threads at the lowest priority."""
    piece = Piece(minutes)
    piece.listen()
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        return piece, torch.device("cuda")
    torch.set_num_threads(threads)
    os.nice(max(0, 19 - os.nice(0)))
    return piece, torch.device("cpu")


def progress(step: int, total: int, rate: str, figures: dict[str, float]) -> None:
    """One line on the terminal, rewritten in place."""
    bar = "#" * int(24 * step / max(total, 1))
    told = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
    print(f"\r[{bar:<24}] {step}/{total}  {rate}  {told} ", end="", flush=True, file=sys.stdout)

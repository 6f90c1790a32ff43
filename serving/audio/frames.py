"""Chunks of any size → frames of 1,920 samples, the 80 ms that everything behind the ingress counts in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

FRAME_SAMPLES = 1_920
_EMPTY = np.zeros(0, dtype=np.int16)


class FrameAssembler:
    """Keeps what is left over between chunks: no sample is lost, doubled or moved."""

    def __init__(self) -> None:
        self._rest: npt.NDArray[np.int16] = _EMPTY

    def push(self, pcm: npt.NDArray[np.int16]) -> Iterator[npt.NDArray[np.int16]]:
        """PCM [any] int16 → frames [1920] int16, each an array of its own. Takes the chunk at once, yields lazily."""
        pending = np.concatenate((self._rest, pcm)) if len(self._rest) else pcm
        whole = len(pending) // FRAME_SAMPLES * FRAME_SAMPLES
        self._rest = pending[whole:].copy()
        return (pending[start : start + FRAME_SAMPLES].copy() for start in range(0, whole, FRAME_SAMPLES))

    def flush(self) -> npt.NDArray[np.int16] | None:
        """The last frame, filled up with silence, or None if nothing waits."""
        if not len(self._rest):
            return None
        frame = np.zeros(FRAME_SAMPLES, dtype=np.int16)
        frame[: len(self._rest)] = self._rest
        self._rest = _EMPTY
        return frame

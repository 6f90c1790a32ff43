"""The opt-in silence gate: leaves out frames in which the agent says nothing.

LiveKit's plugin ends an agent's turn when no audio message came for 500 ms, and a full-duplex model never stops
sending; whoever wants turns out of such a stream asks for the gate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FRAME_MS = 80
THRESHOLD_DBFS = -50.0  # Mimi's own silence decodes to about -70; a whispered word is above -45
HANGOVER_MS = 240  # pauses between words are shorter, so speech is not chopped


class SilenceGate:
    """Opens with the first audible frame, closes after `hangover_ms` without one."""

    def __init__(self, threshold_dbfs: float = THRESHOLD_DBFS, hangover_ms: int = HANGOVER_MS) -> None:
        self._threshold_rms = 32_768.0 * 10 ** (threshold_dbfs / 20)
        self._hangover_frames = hangover_ms // FRAME_MS
        self._quiet_frames = self._hangover_frames + 1  # closed until something is said

    def passes(self, pcm: npt.NDArray[np.int16]) -> bool:
        """Whether this frame [1920] int16 is to be sent."""
        rms = float(np.sqrt(np.mean(np.square(pcm, dtype=np.float32)))) if len(pcm) else 0.0
        self._quiet_frames = 0 if rms >= self._threshold_rms else self._quiet_frames + 1
        return self._quiet_frames <= self._hangover_frames

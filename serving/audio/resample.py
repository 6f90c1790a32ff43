"""Streaming sample-rate conversion (libsoxr), for clients whose PCM is not 24 kHz."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import soxr

from serving.audio.errors import PcmError

RATE_HZ = 24_000
LOWEST_HZ, HIGHEST_HZ = 8_000, 96_000


class StreamResampler:
    """Mono int16 PCM from one rate to another, chunk by chunk, without a seam between the chunks.

    The filter works in blocks: measured with 20 ms chunks it holds back 21 ms in the middle and 40 ms at most (75 ms
    from 8 kHz), and costs 5 µs a chunk; `flush` gives the rest. A client that can send 24 kHz itself saves that time.
    Quality "HQ" is flat to 11 kHz and 84 dB down above 12; "LQ" would halve the wait and lose everything above 9 kHz.
    """

    def __init__(self, in_hz: int, out_hz: int = RATE_HZ) -> None:
        for rate in (in_hz, out_hz):
            if not LOWEST_HZ <= rate <= HIGHEST_HZ:
                raise PcmError(f"a sample rate of {rate} Hz is not between {LOWEST_HZ} and {HIGHEST_HZ}")
        self._stream = None if in_hz == out_hz else soxr.ResampleStream(in_hz, out_hz, 1, dtype="int16", quality="HQ")

    def push(self, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """PCM [n] int16 at the input rate → what can be said of it at the output rate."""
        return pcm if self._stream is None else self._convert(pcm, last=False)

    def flush(self) -> npt.NDArray[np.int16]:
        """The samples that the filter still held; the stream is over then."""
        empty = np.zeros(0, dtype=np.int16)
        return empty if self._stream is None else self._convert(empty, last=True)

    def _convert(self, pcm: npt.NDArray[np.int16], *, last: bool) -> npt.NDArray[np.int16]:
        assert self._stream is not None
        return np.asarray(self._stream.resample_chunk(pcm, last=last), dtype=np.int16).reshape(-1)

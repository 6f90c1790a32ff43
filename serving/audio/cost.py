"""What a client's audio costs the ingress: `python -m serving.audio.cost SPEECH.wav` prints milliseconds a frame."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import soundfile

from serving.audio.frames import FRAME_SAMPLES
from serving.audio.opus import libopus_location
from serving.audio.payload import OpusPayloadDecoder, OpusPayloadEncoder, Pcm
from serving.audio.resample import StreamResampler

COMPLEXITIES = (0, 5, 10)


def frames_of(path: str) -> Iterator[Pcm]:
    """A recording's first channel as 80 ms frames [1920] int16 at 24 kHz."""
    pcm, rate = soundfile.read(path, dtype="int16", always_2d=True)
    resampler = StreamResampler(rate)
    mono = np.concatenate((resampler.push(np.ascontiguousarray(pcm[:, 0])), resampler.flush()))
    for start in range(0, len(mono) - FRAME_SAMPLES + 1, FRAME_SAMPLES):
        yield mono[start : start + FRAME_SAMPLES]


def measure(frames: list[Pcm], complexity: int) -> str:
    """One line of the table."""
    encoder, decoder = OpusPayloadEncoder(complexity), OpusPayloadDecoder()
    encode_ms, decode_ms, size = [], [], 0
    for frame in frames:
        started = time.perf_counter()
        payload = encoder.encode(frame)
        encoded = time.perf_counter()
        heard = list(decoder.frames(payload))
        decoded = time.perf_counter()
        assert len(heard) == 1
        encode_ms.append((encoded - started) * 1000)
        decode_ms.append((decoded - encoded) * 1000)
        size += len(payload)
    encoder.close()
    decoder.close()
    figures = [f(values) for values in (encode_ms, decode_ms) for f in (statistics.median, _p99)]
    return f"{complexity:10d} {''.join(f'{ms:9.2f}' for ms in figures)} {size / 10 / len(frames):8.1f}"


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def main(path: str) -> None:
    frames = list(frames_of(path))
    print(f"{len(frames)} frames, {libopus_location()}; milliseconds a frame, pages and checksums included")
    print("complexity   encode      p99   decode      p99   kbit/s")
    for complexity in COMPLEXITIES:
        print(measure(frames, complexity))


if __name__ == "__main__":
    main(sys.argv[1])

"""Frames, resampling, silence: no sample is lost, no seam is heard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.audio.errors import PcmError
from serving.audio.frames import FrameAssembler
from serving.audio.resample import StreamResampler
from serving.audio.silence import SilenceGate


@given(st.lists(st.integers(0, 5000), max_size=20))
def test_every_sample_arrives_once_and_in_order(sizes: list[int]) -> None:
    pcm = np.arange(sum(sizes), dtype=np.int16)
    assembler = FrameAssembler()
    frames = []
    for chunk in np.split(pcm, np.cumsum(sizes)[:-1]) if sizes else []:
        frames += list(assembler.push(chunk))
    last = assembler.flush()
    assert (last is not None) == (len(pcm) % 1920 > 0)
    if last is not None:
        frames.append(last)
    assert all(frame.shape == (1920,) and frame.dtype == np.int16 for frame in frames)
    everything = np.concatenate([*frames, np.zeros(0, np.int16)])
    assert np.array_equal(everything[: len(pcm)], pcm)
    assert not everything[len(pcm) :].any()
    assert len(frames) == -(-len(pcm) // 1920)
    assert assembler.flush() is None


def test_frames_do_not_share_the_callers_memory() -> None:
    chunk = np.ones(1920, dtype=np.int16)
    (frame,) = FrameAssembler().push(chunk)
    chunk[:] = 0
    assert frame.all()


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_resampling_in_chunks_equals_resampling_at_once(rate: int) -> None:
    pcm = (9000 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.int16)
    whole, pieces = StreamResampler(rate), StreamResampler(rate)
    once = np.concatenate((whole.push(pcm), whole.flush()))
    chunked = np.concatenate([*(pieces.push(chunk) for chunk in np.array_split(pcm, 53)), pieces.flush()])
    assert len(once) == len(chunked) == 24_000
    # soxr dithers when it rounds to 16 bits, and each stream draws its own noise.
    assert np.abs(once.astype(int) - chunked).max() <= 3
    expected = 9000 * np.sin(2 * np.pi * 440 * np.arange(24_000) / 24_000)
    assert np.abs(chunked - expected)[500:-500].max() < 20


def test_equal_rates_pass_untouched() -> None:
    pcm = np.arange(100, dtype=np.int16)
    resampler = StreamResampler(24_000)
    assert np.array_equal(resampler.push(pcm), pcm)
    assert not len(resampler.flush())


def test_rates_nobody_has_are_refused() -> None:
    with pytest.raises(PcmError, match="1 Hz"):
        StreamResampler(1)


def frame(amplitude: int) -> np.ndarray:
    return np.full(1920, amplitude, dtype=np.int16)


def test_gate_opens_at_once_and_closes_after_its_hangover() -> None:
    gate = SilenceGate(threshold_dbfs=-50.0, hangover_ms=240)  # -50 dBFS is an amplitude of 104
    assert not gate.passes(frame(50))
    assert gate.passes(frame(200))
    assert [gate.passes(frame(50)) for _ in range(5)] == [True, True, True, False, False]
    assert gate.passes(frame(-200))

"""Opus packets ↔ PCM: what comes back is what went in, and what is no Opus is refused in words."""

from __future__ import annotations

import ctypes.util
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.audio import opus
from serving.audio.errors import LibopusMissingError, OpusPacketError
from serving.audio.opus import OpusDecoder, OpusEncoder, Pcm, find_libopus, libopus_location


def sweep(samples: int) -> Pcm:
    """A tone that glides from 200 Hz to 3 kHz, a third of full scale."""
    t = np.arange(samples) / 24_000
    return (10_000 * np.sin(2 * np.pi * (200 * t + 2_800 / (2 * t[-1]) * t**2))).astype(np.int16)


def similarity(sent: Pcm, heard: Pcm) -> float:
    """Correlation at the best delay: the encoder looks ahead, and its high-pass filter turns phases."""
    return max(float(np.corrcoef(sent[: len(sent) - lag], heard[lag:])[0, 1]) for lag in range(100, 250))


@pytest.mark.parametrize("complexity", [0, 5, 10])
def test_speech_comes_back_nearly_the_same(complexity: int) -> None:
    pcm = sweep(24_000 // 1920 * 1920)
    encoder, decoder = OpusEncoder(complexity=complexity), OpusDecoder()
    assert encoder.complexity == complexity
    packets = [packet for start in range(0, len(pcm), 1920) for packet in encoder.encode(pcm[start : start + 1920])]
    assert len(packets) == len(pcm) // 480
    heard = np.concatenate([decoder.decode(packet) for packet in packets])
    assert len(heard) == len(pcm)
    assert encoder.lookahead_48k == 312
    assert similarity(pcm, heard) > 0.95
    encoder.close()
    decoder.close()


@pytest.mark.parametrize("packet_ms", [2.5, 5, 10, 20, 40, 60, 80, 100, 120])
@pytest.mark.parametrize("client_hz", [8_000, 16_000, 24_000, 48_000])
def test_any_packet_length_and_any_client_rate(packet_ms: float, client_hz: int) -> None:
    encoder = OpusEncoder(client_hz)
    encoder.packet_samples = int(client_hz * packet_ms / 1000)
    (packet,) = encoder.encode(np.zeros(encoder.packet_samples, dtype=np.int16))
    assert len(OpusDecoder().decode(packet)) == 24 * packet_ms


def test_stereo_is_heard_as_mono() -> None:
    api = opus._api()
    state = api.encoder.create_state(48_000, 2, 2048)
    try:
        loud = np.full(960, 8_000, dtype=np.int16)
        packet = api.encoder.encode(state, np.stack((loud, loud), axis=1).tobytes(), 960, 4000)
    finally:
        api.encoder.destroy(state)
    assert OpusDecoder().decode(packet).shape == (480,)


@given(st.binary(max_size=1500))
def test_garbage_is_decoded_or_refused_but_nothing_else(packet: bytes) -> None:
    try:
        samples = len(OpusDecoder().decode(packet))
    except OpusPacketError:
        return
    assert 60 <= samples <= 2880


def test_an_empty_packet_is_no_packet() -> None:
    with pytest.raises(OpusPacketError, match="empty"):
        OpusDecoder().decode(b"")


def test_gain_of_the_header_is_applied() -> None:
    plain, halved = OpusDecoder(), OpusDecoder()
    halved.set_gain(-6 * 256)
    encoder = OpusEncoder()
    pcm = sweep(4800)
    pairs = [(plain.decode(packet), halved.decode(packet)) for packet in encoder.encode(pcm)]
    loud = np.concatenate([a for a, _ in pairs]).astype(float).std()
    quiet = np.concatenate([b for _, b in pairs]).astype(float).std()
    assert quiet / loud == pytest.approx(0.501, abs=0.01)


def test_wrong_lengths_types_and_settings_are_named() -> None:
    encoder = OpusEncoder()
    with pytest.raises(ValueError, match=r"int16 \[k \* 480\]"):
        encoder.encode(np.zeros(481, dtype=np.int16))
    with pytest.raises(ValueError, match="float32"):
        encoder.encode(np.zeros(480, dtype=np.float32))  # type: ignore[arg-type]  # the wrong type is the point
    with pytest.raises(ValueError, match="0 to 10"):
        OpusEncoder(complexity=11)


def test_close_twice_frees_once() -> None:
    for codec in (OpusEncoder(), OpusDecoder()):
        codec.close()
        codec.close()


@pytest.fixture
def no_system_libopus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    opus._api.cache_clear()
    yield
    opus._api.cache_clear()


@pytest.mark.usefixtures("no_system_libopus")
def test_the_libopus_in_pyavs_wheel_is_found_and_loads() -> None:
    found = find_libopus()
    assert found is not None
    assert "opus" in found
    assert ctypes.CDLL(found).opus_get_version_string is not None


@pytest.mark.usefixtures("no_system_libopus")
def test_no_libopus_at_all_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LibopusMissingError, match=r"apt-get install libopus0.*brew install opus"):
        libopus_location()

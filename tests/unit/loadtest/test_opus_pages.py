"""Counting samples without decoding, against a decoder."""

from __future__ import annotations

import numpy as np
import pytest
import sphn
from hypothesis import given
from hypothesis import strategies as st

from loadtest.opus_pages import NotOpus, samples_in
from loadtest.speech import RATE, Recording
from serving.audio.payload import OpusPayloadEncoder

NOISE = np.random.default_rng(1).standard_normal(20 * 1920).astype(np.float32) * 0.1


def page(*packets: bytes) -> bytes:
    """An Ogg page; what nobody here looks at is zero."""
    lacing = b"".join(bytes([255] * (len(packet) // 255) + [len(packet) % 255]) for packet in packets)
    return b"OggS" + bytes(22) + bytes([len(lacing)]) + lacing + b"".join(packets)


def test_the_servers_pages_hold_a_frame_each() -> None:
    encoder = OpusPayloadEncoder()
    pcm = (NOISE * 32767).astype(np.int16).reshape(-1, 1920)
    assert [samples_in(encoder.encode(frame)) for frame in pcm] == [1920] * len(pcm)
    encoder.close()


def test_a_skipped_frame_is_not_counted() -> None:
    encoder = OpusPayloadEncoder()
    encoder.encode(np.zeros(1920, dtype=np.int16))
    encoder.skip()
    assert samples_in(encoder.encode(np.zeros(1920, dtype=np.int16))) == 1920
    encoder.close()


def test_it_agrees_with_a_decoder() -> None:
    recording = Recording.of("noise", NOISE)
    reader = sphn.OpusStreamReader(RATE)
    decoded = sum(len(reader.append_bytes(chunk)) for chunk in recording.ogg)
    assert sum(samples_in(chunk) for chunk in recording.ogg) == decoded


@pytest.mark.parametrize(
    ("first_byte", "second_byte", "samples"),
    [
        (0b00001_0_00, 0, 480),  # SILK, 20 ms, one frame
        (0b00011_0_01, 0, 2 * 1440),  # SILK, 60 ms, two frames
        (0b01101_1_00, 0, 480),  # hybrid, 20 ms
        (0b11100_0_00, 0, 60),  # CELT, 2.5 ms
        (0b11111_0_11, 4, 4 * 480),  # CELT, 20 ms, count in the second byte
    ],
)
def test_a_packets_length_is_in_its_first_bytes(first_byte: int, second_byte: int, samples: int) -> None:
    packet = bytes([first_byte, second_byte]) + bytes(10)
    assert samples_in(page(packet)) == samples
    assert samples_in(page(packet, packet) + page(packet)) == 3 * samples


def test_a_long_packet_is_one() -> None:
    assert samples_in(page(bytes([0b11111_0_00]) + bytes(600))) == 480
    assert samples_in(page(bytes([0b11111_0_00]) + bytes(254))) == 480  # 255 bytes: a lacing value of zero ends it


def test_nothing_is_no_sound() -> None:
    assert samples_in(b"") == 0


@pytest.mark.parametrize("payload", [b"RIFF", b"OggS", page(b"\x08")[:-1], page(bytes([0b11111_0_11]))])
def test_what_is_no_opus_is_said(payload: bytes) -> None:
    with pytest.raises(NotOpus):
        samples_in(payload)


@given(st.binary(max_size=120), st.binary(max_size=60))
def test_any_bytes_are_counted_or_refused(before: bytes, packet: bytes) -> None:
    for payload in (before, page(packet), page(packet) + before):
        try:
            assert samples_in(payload) >= 0
        except NotOpus:
            continue

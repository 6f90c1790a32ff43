"""Ogg pages: round trips at any split, strangers' streams both ways, and nothing but OggError for garbage."""

from __future__ import annotations

import io
import itertools
import random

import av
import numpy as np
import pytest
import sphn
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.audio.errors import OggError
from serving.audio.ogg import OggOpusReader, OggOpusWriter, OpusHead, page_checksum
from serving.audio.opus import OpusDecoder, OpusEncoder, Pcm

PACKETS = st.lists(st.lists(st.binary(min_size=1, max_size=700), min_size=1, max_size=12), max_size=8)


def stream(pages: list[list[bytes]], *, serial: int = 7, last: bool = False) -> bytes:
    writer = OggOpusWriter(serial=serial)
    written = [writer.headers()]
    for number, packets in enumerate(pages):
        written.append(writer.page(packets, 960, last=last and number == len(pages) - 1))
    return b"".join(written)


def read(data: bytes, cuts: list[int] | None = None) -> list[bytes]:
    reader = OggOpusReader()
    edges = [0, *sorted(cuts or []), len(data)]
    return [packet for a, b in itertools.pairwise(edges) for packet in reader.feed(data[a:b])]


def repair(page: bytearray) -> bytes:
    """The page with its checksum right again."""
    page[22:26] = bytes(4)
    page[22:26] = page_checksum(page).to_bytes(4, "little")
    return bytes(page)


def slow_checksum(page: bytes) -> int:
    """RFC 3533's CRC, a bit at a time."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return crc


@given(st.binary(max_size=300))
def test_checksum_is_the_rfcs(page: bytes) -> None:
    assert page_checksum(page) == slow_checksum(page)


@given(PACKETS, st.data())
def test_packets_survive_any_split(pages: list[list[bytes]], data: st.DataObject) -> None:
    ogg = stream(pages)
    cuts = data.draw(st.lists(st.integers(0, len(ogg)), max_size=20))
    assert read(ogg, cuts) == [packet for packets in pages for packet in packets]


def test_a_byte_at_a_time() -> None:
    pages = [[b"a" * 254, b"b" * 255], [b"c" * 256, b"d" * 510, b"e"]]
    ogg = stream(pages)
    assert read(ogg, list(range(len(ogg)))) == [*pages[0], *pages[1]]


def refusal(reader: OggOpusReader, data: bytes) -> tuple[list[bytes], OggError | None]:
    """The packets that came through before the stream was refused, and the refusal. Other errors are bugs."""
    got: list[bytes] = []
    try:
        for packet in reader.feed(data):
            got.append(packet)
        reader.finish()
    except OggError as error:
        return got, error
    return got, None


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=10))
def test_garbage_gives_ogg_errors_only(chunks: list[bytes]) -> None:
    reader = OggOpusReader()
    for chunk in chunks:
        got, error = refusal(reader, chunk)
        assert not got
        if error is not None:
            assert len(str(error)) > 10
            assert refusal(reader, stream([[b"x"]])) == ([], error)  # a dead stream stays dead
            break


@given(PACKETS.filter(bool), st.data())
def test_one_flipped_bit_is_never_taken_for_audio(pages: list[list[bytes]], data: st.DataObject) -> None:
    """Every bit of a page is under its checksum; a flip may also make the stream wait for bytes that never come."""
    ogg = bytearray(stream(pages))
    bit = data.draw(st.integers(0, len(ogg) * 8 - 1))
    ogg[bit // 8] ^= 1 << bit % 8
    sent = [packet for packets in pages for packet in packets]
    got, error = refusal(OggOpusReader(), bytes(ogg))
    assert error is not None
    assert got == sent[: len(got)]
    assert len(got) < len(sent)


@given(st.integers(1, 200))
def test_a_truncated_page_is_told_when_the_next_one_comes(missing: int) -> None:
    writer = OggOpusWriter()
    first = writer.headers() + writer.page([b"x" * 300], 960)
    second, third = writer.page([b"y" * 300], 960), writer.page([b"z" * 300] * 3, 960)
    reader = OggOpusReader()
    assert list(reader.feed(first)) == [b"x" * 300]
    assert not list(reader.feed(second[:-missing]))
    assert reader.mid_page
    with pytest.raises(OggError, match="truncated or corrupt"):
        list(reader.feed(third))


def test_a_stream_that_ends_inside_a_page() -> None:
    reader = OggOpusReader()
    list(reader.feed(stream([[b"abc"]])[:-1]))
    with pytest.raises(OggError, match="ends inside a page"):
        reader.finish()


def test_packets_that_span_pages() -> None:
    whole = bytes(random.Random(3).randbytes(255 * 255 + 100 - 5000))
    writer = OggOpusWriter(serial=9)
    head = writer.headers()
    cut = 255 * 40
    first = bytearray(writer.page([whole[: cut - 1]], 0))  # laced as 39 x 255 + 254; make it 40 x 255, unfinished
    first = bytearray(first[:27] + b"\xff" * 40 + whole[:cut])
    first[26] = 40
    second = bytearray(writer.page([whole[cut:], b"next"], 960))
    second[5] = 1  # continued
    assert read(head + repair(first) + repair(second)) == [whole, b"next"]
    # The first half is lost: so is the packet, and nothing else.
    assert read(head + repair(second)) == [b"next"]


def test_leftovers_of_another_stream_are_skipped_before_the_header() -> None:
    """LiveKit's plugin, after a reconnect, first sends what its old encoder had queued."""
    old = OggOpusWriter(serial=42)
    old.headers()
    leftovers = old.page([b"old"], 960) + old.page([b"older"], 960)
    assert read(leftovers + stream([[b"new"]], serial=42)) == [b"new"]


def test_a_stream_without_header_ends_in_an_error() -> None:
    writer = OggOpusWriter()
    writer.headers()
    pages = b"".join(writer.page([b"x"], 960) for _ in range(3000))
    with pytest.raises(OggError, match="no Opus header"):
        read(pages)


def test_chained_streams_and_their_ends() -> None:
    reader = OggOpusReader()
    assert list(reader.feed(stream([[b"one"]], serial=1, last=True))) == [b"one"]
    assert reader.ended
    assert list(reader.feed(stream([[b"two"]], serial=2))) == [b"two"]
    assert not reader.ended


def test_pages_that_carry_nothing_do_not_keep_us_busy() -> None:
    writer = OggOpusWriter()
    flood = writer.headers() + b"".join(writer.page([], 0) for _ in range(100))
    with pytest.raises(OggError, match="carry no audio"):
        read(flood)
    with pytest.raises(OggError, match="carry no audio"):
        read(b"".join(OggOpusWriter(serial=n).headers() for n in range(100)))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"\x01vorbis" + bytes(30), "not Opus"),
        (b"OpusHead", "not Opus"),
        (OpusHead().to_bytes()[:8] + b"\x21" + OpusHead().to_bytes()[9:], "version 33"),
        (OpusHead(channels=3).to_bytes(), "3 channels"),
        (OpusHead().to_bytes()[:-1] + b"\x01", "family 1"),
    ],
)
def test_streams_that_are_not_ours_to_play(head: bytes, message: str) -> None:
    page = bytearray(OggOpusWriter().page([head], 0))
    page[5] = 2
    with pytest.raises(OggError, match=message):
        read(repair(page))


@given(st.integers(1, 2), st.integers(0, 65_535), st.integers(0, 2**32 - 1), st.integers(-(2**15), 2**15 - 1))
def test_head_round_trip(channels: int, pre_skip: int, rate: int, gain: int) -> None:
    head = OpusHead(channels, pre_skip, rate, gain)
    assert OpusHead.from_bytes(head.to_bytes()) == head


def test_too_much_for_one_page() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        OggOpusWriter().page([b"x" * 65_025], 960)


# Streams of others, and ours in others' hands.


def tone(samples: int) -> Pcm:
    return (8000 * np.sin(np.arange(samples) * 0.05)).astype(np.int16)


def similarity(sent: Pcm, heard: Pcm) -> float:
    """Correlation at the best delay."""
    return max(float(np.corrcoef(sent[: len(sent) - lag], heard[lag:])[0, 1]) for lag in range(0, 400, 3))


def ours(pcm: Pcm) -> list[bytes]:
    encoder = OpusEncoder()
    writer = OggOpusWriter(OpusHead(pre_skip=encoder.lookahead_48k))
    pages = [writer.page(encoder.encode(pcm[start : start + 1920]), 3840) for start in range(0, len(pcm), 1920)]
    return [writer.headers() + pages[0], *pages[1:]]


def heard(data: bytes, step: int) -> Pcm:
    decoder = OpusDecoder()
    return np.concatenate([decoder.decode(p) for p in read(data, list(range(0, len(data), step)))])


def test_sphn_plays_ours_message_by_message() -> None:
    """The reader of Kyutai's servers and of LiveKit's plugin."""
    pcm = tone(1920 * 25)
    reader = sphn.OpusStreamReader(24_000)
    got = np.concatenate([reader.append_bytes(message) for message in ours(pcm)])
    assert len(got) == len(pcm)
    assert similarity(pcm, got) > 0.95


def test_pyav_plays_ours() -> None:
    pcm = tone(1920 * 25)
    with av.open(io.BytesIO(b"".join(ours(pcm)))) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples == 2 * len(pcm) - 312  # at 48 kHz, less the pre-skip


@pytest.mark.parametrize("step", [1, 97, 4096])
def test_we_play_sphns(step: int) -> None:
    pcm = tone(1920 * 10)
    writer = sphn.OpusStreamWriter(24_000)
    data = b"".join(
        writer.append_pcm((pcm[start : start + 1920] / 32768).astype(np.float32)) for start in range(0, len(pcm), 1920)
    )
    got = heard(data, step)
    assert len(got) == len(pcm)
    assert similarity(pcm, got) > 0.95


def test_we_play_pyavs() -> None:
    pcm = np.repeat(tone(24_000), 2)
    out = io.BytesIO()
    with av.open(out, "w", format="ogg") as container:
        track = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = 48_000
        container.mux(track.encode(frame))
        container.mux(track.encode())
    assert 24_000 <= len(heard(out.getvalue(), 500)) < 25_000

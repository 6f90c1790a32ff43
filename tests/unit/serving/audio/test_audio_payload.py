"""The codec halves of a connection: what goes out can come in again, and a message can't hold us up."""

from __future__ import annotations

import numpy as np
import pytest

from serving.audio.errors import AudioError, OggError, PcmError
from serving.audio.ogg import OggOpusWriter
from serving.audio.opus import OpusEncoder
from serving.audio.payload import OpusPayloadDecoder, OpusPayloadEncoder, PcmPayloadDecoder, PcmPayloadEncoder


def tone(samples: int) -> np.ndarray:
    return (8000 * np.sin(np.arange(samples) * 0.05)).astype(np.int16)


def test_opus_out_and_in_again() -> None:
    pcm = tone(1920 * 20).reshape(20, 1920)
    out, back = OpusPayloadEncoder(), OpusPayloadDecoder()
    frames = [frame for row in pcm for frame in back.frames(out.encode(row))]
    assert len(frames) == 20
    heard, sent = np.concatenate(frames), pcm.reshape(-1)
    assert max(np.corrcoef(sent[: len(sent) - lag], heard[lag:])[0, 1] for lag in range(400)) > 0.95
    out.close()
    back.close()
    back.close()


def test_pcm_out_and_in_again() -> None:
    pcm = tone(1920)
    (back,) = PcmPayloadDecoder().frames(PcmPayloadEncoder().encode(pcm))
    assert np.array_equal(back, pcm)


def test_pcm_at_another_rate() -> None:
    decoder = PcmPayloadDecoder(48_000)
    frames = list(decoder.frames(tone(96_000).astype("<i2").tobytes()))
    assert 24 <= len(frames) <= 25
    decoder.close()


def test_half_a_sample_is_refused() -> None:
    with pytest.raises(PcmError, match="3 of them"):
        list(PcmPayloadDecoder().frames(b"abc"))


def test_flush_fills_up_with_silence_and_the_end_of_the_stream_flushes() -> None:
    decoder = PcmPayloadDecoder()
    assert not list(decoder.frames(b"\x01\x00" * 100))
    (last,) = decoder.flush()
    assert last[:100].all()
    assert not last[100:].any()
    assert not list(decoder.flush())
    writer, encoder = OggOpusWriter(), OpusEncoder()
    ended = writer.headers() + writer.page(encoder.encode(tone(480)), 960, last=True)
    assert len(list(OpusPayloadDecoder().frames(ended))) == 1


def test_a_message_of_hours_is_decoded_only_as_far_as_it_is_read() -> None:
    """Two bytes can stand for 120 ms; a megabyte of them must not become gigabytes of samples at once."""
    hours = [b"\x1b\x02"] * 100  # SILK, 60 ms twice, no data
    writer = OggOpusWriter()
    message = writer.headers() + b"".join(writer.page(hours, 576_000) for _ in range(100))
    frames = OpusPayloadDecoder().frames(message)
    assert next(frames).shape == (1920,)
    frames.close()  # type: ignore[attr-defined]  # it is a generator; dropping it must not decode the rest


def test_a_chained_stream_gets_a_decoder_of_its_own() -> None:
    decoder = OpusPayloadDecoder()
    for _ in range(3):
        out = OpusPayloadEncoder()
        assert len(list(decoder.frames(out.encode(tone(1920)) + out.encode(tone(1920))))) == 2


@pytest.mark.parametrize("payload", [b"RIFF" + bytes(100), b"OggS\x01" + bytes(100)])
def test_what_is_no_ogg_is_told(payload: bytes) -> None:
    with pytest.raises(OggError):
        list(OpusPayloadDecoder().frames(payload))


def test_a_page_of_nonsense_with_a_good_checksum() -> None:
    writer = OggOpusWriter()
    with pytest.raises(AudioError, match="cannot be decoded"):
        list(OpusPayloadDecoder().frames(writer.headers() + writer.page([b"\xff\xff\xff"], 960)))

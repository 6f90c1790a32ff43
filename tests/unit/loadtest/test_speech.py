from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import sphn

import loadtest
from loadtest.speech import (
    RATE,
    TAIL_FRAMES,
    EndlessSpeech,
    Recording,
    UnreadableAudio,
    read_speech,
    to_int16,
    write_wav,
)

CALLERS = sorted((Path(loadtest.__file__).parent / "data").glob("*.opus"))


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channel_count_becomes_24_khz_mono(rate: int, channels: int, tmp_path: Path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 300 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "in.wav", np.stack([tone] * channels, axis=1), rate)
    speech = read_speech(tmp_path / "in.wav")
    assert speech.dtype == np.float32
    assert abs(len(speech) - RATE) <= 1
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(RATE) / RATE)
    assert np.abs(speech[2000:22000] - expected[2000:22000]).max() < 0.01


def test_what_is_no_audio_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableAudio, match="no file"):
        read_speech(tmp_path / "missing.wav")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UnreadableAudio, match="cannot be read"):
        read_speech(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(UnreadableAudio, match="empty"):
        read_speech(tmp_path / "empty.wav")


def test_a_recording_becomes_one_chunk_per_frame_that_decodes_to_itself() -> None:
    pcm = (0.3 * np.sin(2 * np.pi * 300 * np.arange(5 * 1920 - 700) / RATE)).astype(np.float32)
    recording = Recording.of("tone", pcm)
    assert recording.frames == 5
    assert len(recording.ogg) == 5 + TAIL_FRAMES
    reader = sphn.OpusStreamReader(RATE)
    decoded = np.concatenate([reader.append_bytes(chunk) for chunk in recording.ogg])
    assert len(decoded) == 1920 * (5 + TAIL_FRAMES)
    assert 0.1 < np.sqrt(np.mean(decoded[:8000] ** 2)) < 0.3
    assert np.abs(decoded[8 * 1920 :]).max() < 0.01


def test_endless_speech_is_one_stream_that_begins_again_and_is_encoded_once() -> None:
    pcm = (0.3 * np.sin(2 * np.pi * 300 * np.arange(3 * 1920) / RATE)).astype(np.float32)
    pcm[1920:] = 0
    speech = EndlessSpeech(pcm)
    one, other = speech.chunks(), speech.chunks()
    chunks = [next(one) for _ in range(9)]
    assert [next(other) for _ in range(9)] == chunks
    reader = sphn.OpusStreamReader(RATE)
    decoded = np.concatenate([reader.append_bytes(chunk) for chunk in chunks]).reshape(9, 1920)
    loud = np.sqrt(np.mean(decoded**2, axis=1)) > 0.05
    assert loud.reshape(3, 3)[:, 0].all()
    assert not loud.reshape(3, 3)[:, 2].any()


def test_nothing_cannot_be_said_endlessly() -> None:
    with pytest.raises(ValueError, match="nothing to say"):
        EndlessSpeech(np.zeros(0, dtype=np.float32))


def test_wavs_are_as_long_as_their_longest_channel(tmp_path: Path) -> None:
    write_wav(tmp_path / "new" / "out.wav", np.full(10, 0.5, dtype=np.float32), np.full(4, -7, dtype=np.int16))
    sound, rate = soundfile.read(tmp_path / "new" / "out.wav", dtype="int16")
    assert rate == RATE
    assert sound[:, 0].tolist() == [16384] * 10
    assert sound[:, 1].tolist() == [-7] * 4 + [0] * 6


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    assert to_int16(np.array([2.0, -2.0, 1.0, 0.0], dtype=np.float32)).tolist() == [32767, -32768, 32767, 0]


def test_the_callers_that_ship_are_short_and_small() -> None:
    assert [path.stem for path in CALLERS] == ["evening", "exam", "sky", "supper"]
    for path in CALLERS:
        assert path.stat().st_size < 120_000
        assert 15 < len(read_speech(path)) / RATE < 30

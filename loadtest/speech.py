"""Recordings in and out: any file to 24 kHz mono frames, frames to Ogg-Opus as a client sends it, wavs written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import sphn

Samples = npt.NDArray[np.float32]  # [n], 24 kHz, -1 … 1

RATE = 24_000
FRAME_SAMPLES = 1_920  # 80 ms
FRAME_S = FRAME_SAMPLES / RATE

# Sent after the recording's end until the last answer is in; the microphone of a real caller stays open as well.
TAIL_FRAMES = 50


class UnreadableAudio(ValueError):
    """The file is missing, empty, or no audio."""


@dataclass(frozen=True)
class Recording:
    """What one caller says: samples, and the same as one Ogg-Opus chunk per frame with a tail of silence.

    Encoded once and shared by all who play it: it costs 1 ms a frame, which a load generator has no time for.
    """

    name: str
    pcm: Samples
    ogg: tuple[bytes, ...]

    @property
    def frames(self) -> int:
        """Frames that the recording fills, the last one padded."""
        return -(-len(self.pcm) // FRAME_SAMPLES)

    @property
    def seconds(self) -> float:
        return len(self.pcm) / RATE

    @staticmethod
    def of(name: str, pcm: Samples) -> Recording:
        """pcm: [n] float32 at 24 kHz."""
        padded = np.concatenate([in_frames(pcm), np.zeros((TAIL_FRAMES, FRAME_SAMPLES), dtype=np.float32)])
        writer = sphn.OpusStreamWriter(RATE)
        return Recording(name, pcm, tuple(bytes(writer.append_pcm(frame)) for frame in padded))


class EndlessSpeech:
    """A recording over and over as one Ogg-Opus stream, a chunk per frame: somebody who never stops talking.

    A chunk is encoded when it is first asked for and kept, since many play the same: 5 kB for a second.
    """

    def __init__(self, pcm: Samples) -> None:
        """pcm: [n] float32 at 24 kHz. Raises ValueError if it is empty."""
        if not len(pcm):
            raise ValueError("there is nothing to say in a recording of no samples")
        self._frames = in_frames(pcm)
        self._writer = sphn.OpusStreamWriter(RATE)
        self._ogg: list[bytes] = []

    def prepare(self, frames: int) -> None:
        """Encodes the first `frames` now, at 1 ms each."""
        while len(self._ogg) < frames:
            self._ogg.append(bytes(self._writer.append_pcm(self._frames[len(self._ogg) % len(self._frames)])))

    def chunks(self) -> Iterator[bytes]:
        """From the beginning, without an end."""
        for frame in itertools.count():
            self.prepare(frame + 1)
            yield self._ogg[frame]


def read_speech(path: Path) -> Samples:
    """A file's sound as [n] float32 at 24 kHz, its channels averaged. Raises UnreadableAudio."""
    if not path.is_file():
        raise UnreadableAudio(f"there is no file {path}")
    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UnreadableAudio(f"{path} cannot be read as audio: {error.error_string}") from error
    if not len(sound):
        raise UnreadableAudio(f"{path} is empty")
    mono = sound.mean(axis=1)
    if rate != RATE:
        mono = soxr.resample(mono, rate, RATE)
    return np.ascontiguousarray(mono, dtype=np.float32)


def in_frames(pcm: Samples) -> npt.NDArray[np.float32]:
    """[n] → [frames, 1920], the last frame padded with silence."""
    padded = np.pad(pcm, (0, -len(pcm) % FRAME_SAMPLES))
    return padded.reshape(-1, FRAME_SAMPLES)


def to_int16(pcm: npt.NDArray[np.float32] | npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Samples as a wav holds them; what already is int16 stays as it is."""
    if pcm.dtype == np.int16:
        return pcm.astype(np.int16, copy=False)
    return np.clip(np.round(pcm * 32768.0), -32768, 32767).astype(np.int16)


def write_wav(path: Path, *channels: Samples | npt.NDArray[np.int16]) -> None:
    """Writes one 16-bit channel each; shorter ones end in silence."""
    tracks = [to_int16(channel) for channel in channels]
    length = max(len(track) for track in tracks)
    sound = np.zeros((length, len(tracks)), dtype=np.int16)
    for column, track in enumerate(tracks):
        sound[: len(track), column] = track
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, RATE, subtype="PCM_16")

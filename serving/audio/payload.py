"""A client's audio payloads ↔ frames: the codec halves of a connection, Ogg-Opus or raw PCM, behind two protocols.

Both ways run in the ingress's event loop. The measured cost of one 80 ms frame is in docs/decisions/opus.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from serving.audio.errors import PcmError
from serving.audio.frames import FRAME_SAMPLES, FrameAssembler
from serving.audio.ogg import OggOpusReader, OggOpusWriter, OpusHead
from serving.audio.opus import DEFAULT_COMPLEXITY, RATE_HZ, OpusDecoder, OpusEncoder
from serving.audio.resample import StreamResampler

Pcm = npt.NDArray[np.int16]
_TO_48K = 48_000 // RATE_HZ  # Ogg's clock for Opus always runs at 48 kHz


class PayloadDecoder(Protocol):
    """What a client sends → frames [1920] int16 at 24 kHz."""

    @property
    def mid_page(self) -> bool:
        """Whether the client stopped inside a container's page."""

    def frames(self, payload: bytes) -> Iterator[Pcm]:
        """The frames that are whole now, lazily: read to the end. Raises AudioError."""

    def flush(self) -> Iterator[Pcm]:
        """What is left, filled up with silence to one last frame."""

    def close(self) -> None:
        """Free native memory. Safe to call twice."""


class PayloadEncoder(Protocol):
    """Frames [1920] int16 at 24 kHz → what the client is sent."""

    def encode(self, pcm: Pcm) -> bytes: ...

    def skip(self) -> None:
        """A frame that is not sent; the stream's clock goes on."""

    def close(self) -> None: ...


class OpusPayloadDecoder:
    """Ogg-Opus pages, split anywhere. Pre-skip is kept, not cut: 80 ms sent are 80 ms heard, as with sphn."""

    def __init__(self) -> None:
        self._reader = OggOpusReader()
        self._decoder: OpusDecoder | None = None
        self._head: OpusHead | None = None
        self._assembler = FrameAssembler()

    def frames(self, payload: bytes) -> Iterator[Pcm]:
        for packet in self._reader.feed(payload):
            yield from self._assembler.push(self._decoder_now().decode(packet))
        if self._reader.ended:
            yield from self.flush()

    def _decoder_now(self) -> OpusDecoder:
        """A chained stream starts with a decoder of its own."""
        if self._decoder is None or self._head is not self._reader.head:
            self.close()
            self._head = self._reader.head
            self._decoder = OpusDecoder()
            if self._head is not None and self._head.output_gain_q8_db:
                self._decoder.set_gain(self._head.output_gain_q8_db)
        return self._decoder

    @property
    def mid_page(self) -> bool:
        return self._reader.mid_page

    def flush(self) -> Iterator[Pcm]:
        frame = self._assembler.flush()
        if frame is not None:
            yield frame

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


class PcmPayloadDecoder:
    """PCM16, little-endian, mono, at the client's rate; a message holds whole samples."""

    mid_page = False

    def __init__(self, rate_hz: int = RATE_HZ) -> None:
        self._resampler = StreamResampler(rate_hz)
        self._assembler = FrameAssembler()

    def frames(self, payload: bytes) -> Iterator[Pcm]:
        if len(payload) % 2:
            raise PcmError(f"PCM16 comes in pairs of bytes, not {len(payload)} of them")
        yield from self._assembler.push(self._resampler.push(np.frombuffer(payload, dtype="<i2").astype(np.int16)))

    def flush(self) -> Iterator[Pcm]:
        frame = self._assembler.flush()
        if frame is not None:
            yield frame

    def close(self) -> None:
        """Nothing native is held."""


class OpusPayloadEncoder:
    """Ogg-Opus: one page of four 20 ms packets a frame; the first message begins with the stream's headers."""

    def __init__(self, complexity: int = DEFAULT_COMPLEXITY) -> None:
        self._encoder = OpusEncoder(complexity=complexity)
        self._writer = OggOpusWriter(OpusHead(pre_skip=self._encoder.lookahead_48k))
        self._headers = self._writer.headers()

    def encode(self, pcm: Pcm) -> bytes:
        page = self._writer.page(self._encoder.encode(pcm), len(pcm) * _TO_48K)
        headers, self._headers = self._headers, b""
        return headers + page

    def skip(self) -> None:
        self._writer.skip(FRAME_SAMPLES * _TO_48K)

    def close(self) -> None:
        self._encoder.close()


class PcmPayloadEncoder:
    """PCM16, little-endian, mono, 24 kHz."""

    def encode(self, pcm: Pcm) -> bytes:
        return pcm.astype("<i2", copy=False).tobytes()

    def skip(self) -> None:
        """Raw samples have no clock."""

    def close(self) -> None:
        """Nothing native is held."""

"""Ogg-Opus pages ↔ Opus packets, without I/O: bytes in at any boundary, packets out; and the other way.

Why our own: a browser's or LiveKit's stream arrives in pieces of any size, for hours, and must be told apart from
garbage at once. sphn's reader decodes inside (no packets) and takes pages with a wrong checksum; PyAV's demuxer
wants some 4 kB before it opens, pulls instead of being fed, and loses what it had when the feed runs dry. Formats:
RFC 3533 (pages), RFC 7845 (Opus in Ogg).

What is accepted beyond the letter: pages before a stream's first header are skipped (LiveKit's plugin sends the tail
of its previous stream after a reconnect), a new stream may begin at any page (chaining), page numbers may jump (the
packet that spanned the gap is dropped). Granule positions are ignored: the client's clock is the audio it sends.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serving.audio.errors import OggError

_CAPTURE = b"OggS"
_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, flags, granule, serial, page number, checksum, segments
_CONTINUED, _FIRST, _LAST = 1, 2, 4

_LONGEST_PACKET = 61_298  # bytes: 48 frames of 1,275 with their lengths, RFC 6716 section 3.2.5
_ORPHAN_PAGES = 2_000  # about 80 s of 40 ms pages: more than LiveKit's longest retry delay leaves behind
_EMPTY_PAGES = 16  # in a row; a stream has two before its first audio, more is somebody spinning our wheels

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def page_checksum(page: bytes | bytearray | memoryview) -> int:
    """Ogg's CRC-32 (polynomial 0x04c11db7, not reflected, no inversions) of a page whose checksum field is zero.

    zlib has the reflected CRC of the same polynomial, in C: feed it mirrored bytes, mirror its answer.
    """
    mirrored = zlib.crc32(bytes(page).translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED), "big")


@dataclass(frozen=True, slots=True)
class OpusHead:
    """A stream's identification header (RFC 7845 section 5.1). Rates are 48 kHz but for `input_rate_hz`."""

    channels: int = 1
    pre_skip: int = 312
    input_rate_hz: int = 24_000  # of the original; informative
    output_gain_q8_db: int = 0

    def to_bytes(self) -> bytes:
        return struct.pack(
            "<8sBBHIhB", b"OpusHead", 1, self.channels, self.pre_skip, self.input_rate_hz, self.output_gain_q8_db, 0
        )

    @classmethod
    def from_bytes(cls, packet: bytes) -> OpusHead:
        """Raises OggError for anything that is not a mono or stereo Opus stream."""
        if len(packet) < 19 or packet[:8] != b"OpusHead":
            raise OggError("the Ogg stream is not Opus")
        version, channels, pre_skip, rate, gain, family = struct.unpack("<BBHIhB", packet[8:19])
        if version & 0xF0:
            raise OggError(f"Opus header version {version} is not known")
        if family != 0 or channels not in (1, 2):
            raise OggError(f"only mono and stereo Opus are understood, not {channels} channels (family {family})")
        return cls(channels, pre_skip, rate, gain)


class OggOpusReader:
    """Demultiplexes one Ogg-Opus stream. After an OggError it is dead: every later call raises the same."""

    def __init__(self) -> None:
        self.head: OpusHead | None = None  # of the stream now playing
        self.ended = False  # its last page was seen
        self._buffer = bytearray()
        self._serial = 0
        self._next_page = 0
        self._headers_left = 0  # 2 before OpusHead, 1 before OpusTags, 0 in the audio
        self._partial = bytearray()  # a packet that goes on on the next page
        self._in_packet = False
        self._orphans = 0
        self._empty = 0
        self._error: OggError | None = None

    @property
    def mid_page(self) -> bool:
        """Whether bytes of an unfinished page are waiting for their rest."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The audio packets that are whole now, lazily, so that a large message is decoded as fast as it is used.

        Read the iterator to its end before the next call. Raises OggError.
        """
        self._buffer += data
        while (page := self._cut_page()) is not None:
            yield from self._packets(page)

    def finish(self) -> None:
        """The client sends no more. Raises OggError if a page was cut off."""
        if self._error is None and self._buffer:
            self._fail(f"the Ogg stream ends inside a page ({len(self._buffer)} bytes of it arrived)")
        if self._error is not None:
            raise self._error

    def _fail(self, message: str) -> None:
        self._error = OggError(message)
        self._buffer.clear()
        raise self._error

    def _cut_page(self) -> bytes | None:
        """The next whole page with its checksum verified, or None until more has come."""
        if self._error is not None:
            raise self._error
        buffer = self._buffer
        if not _CAPTURE.startswith(bytes(buffer[:4])) and buffer[:4] != _CAPTURE:
            self._fail("an Ogg page was expected ('OggS')")
        if len(buffer) < _HEADER.size:
            return None
        if buffer[4] != 0:
            self._fail(f"Ogg version {buffer[4]} is not known")
        lacing_end = _HEADER.size + buffer[26]
        if len(buffer) < lacing_end:
            return None
        end = lacing_end + sum(buffer[_HEADER.size : lacing_end])
        if len(buffer) < end:
            return None
        page = bytes(buffer[:end])
        del buffer[:end]
        blank = page[:22] + b"\0\0\0\0" + page[26:]
        if page_checksum(blank) != int.from_bytes(page[22:26], "little"):
            self._fail("an Ogg page is truncated or corrupt (its checksum is wrong)")
        return page

    def _packets(self, page: bytes) -> Iterator[bytes]:
        _, _, flags, _, serial, number, _, segments = _HEADER.unpack_from(page)
        self._empty += 1
        if self._empty > _EMPTY_PAGES:
            self._fail(f"{_EMPTY_PAGES} Ogg pages in a row carry no audio")
        if flags & _FIRST:
            self._begin(serial)
        elif serial != self._serial or (self.head is None and self._headers_left == 0):
            self._orphan()
            return
        elif number != self._next_page:
            self._in_packet = False
        self._next_page = (number + 1) & 0xFFFFFFFF
        if not flags & _CONTINUED:
            self._in_packet = False
        position = _HEADER.size + segments
        first = True
        for packet, complete in _laces(page, segments, position):
            if first and flags & _CONTINUED:
                if not self._in_packet:  # its beginning was lost with an earlier page
                    first = False
                    self._in_packet = False
                    continue
            else:
                self._partial.clear()
            first = False
            self._partial += packet
            if len(self._partial) > _LONGEST_PACKET:
                self._fail(f"an Opus packet is longer than {_LONGEST_PACKET} bytes")
            self._in_packet = not complete
            if complete:
                whole = bytes(self._partial)
                if self._headers_left:
                    self._header(whole)
                else:
                    self._empty = 0
                    yield whole
        if flags & _LAST:
            self.ended = True

    def _begin(self, serial: int) -> None:
        self.head = None
        self.ended = False
        self._serial = serial
        self._headers_left = 2
        self._in_packet = False

    def _orphan(self) -> None:
        self._orphans += 1
        self._empty = 0
        if self._orphans > _ORPHAN_PAGES:
            self._fail("the Ogg stream has no Opus header")

    def _header(self, packet: bytes) -> None:
        if self._headers_left == 2:
            try:
                self.head = OpusHead.from_bytes(packet)
            except OggError as error:
                self._fail(str(error))
        elif not packet.startswith(b"OpusTags"):
            self._fail("the Ogg stream's second packet is not its Opus comment header")
        self._headers_left -= 1


def _laces(page: bytes, segments: int, position: int) -> Iterator[tuple[bytes, bool]]:
    """The page's packets or parts of packets, each with whether it ends on this page."""
    size = 0
    for lace in page[_HEADER.size : _HEADER.size + segments]:
        size += lace
        if lace < 255:
            yield page[position : position + size], True
            position += size
            size = 0
    if segments and page[_HEADER.size + segments - 1] == 255:
        yield page[position : position + size], False


class OggOpusWriter:
    """Multiplexes packets into pages. One page a call, so that a page is a message and nothing waits for its fill."""

    def __init__(
        self, head: OpusHead | None = None, *, serial: int = 0x50_50_4C_58, vendor: str = "personaplex"
    ) -> None:
        self._head = head or OpusHead()
        self._serial = serial
        self._vendor = vendor.encode()
        self._page_number = 0
        self._granule = 0  # samples at 48 kHz up to the end of the last packet, pre-skip included

    def headers(self) -> bytes:
        """The two pages that open the stream. Send them before, or in one message with, the first audio page."""
        tags = b"OpusTags" + struct.pack("<I", len(self._vendor)) + self._vendor + struct.pack("<I", 0)
        return self._page([self._head.to_bytes()], _FIRST, 0) + self._page([tags], 0, 0)

    def skip(self, samples_48k: int) -> None:
        """Silence that is not sent: the clock goes on, so that a recording of the stream keeps its time."""
        self._granule += samples_48k

    def page(self, packets: Sequence[bytes], samples_48k: int, *, last: bool = False) -> bytes:
        """One page of whole packets that together last `samples_48k`. Raises ValueError if they do not fit."""
        self._granule += samples_48k
        return self._page(packets, _LAST if last else 0, self._granule)

    def _page(self, packets: Sequence[bytes], flags: int, granule: int) -> bytes:
        lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
        if len(lacing) > 255:
            raise ValueError(f"{len(packets)} packets of {sum(map(len, packets))} bytes do not fit into one Ogg page")
        header = _HEADER.pack(_CAPTURE, 0, flags, granule, self._serial, self._page_number, 0, len(lacing))
        page = bytearray(b"".join((header, lacing, *packets)))
        page[22:26] = page_checksum(page).to_bytes(4, "little")
        self._page_number = (self._page_number + 1) & 0xFFFFFFFF
        return bytes(page)

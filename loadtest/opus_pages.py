"""How much sound is in Ogg-Opus pages, without decoding them: a load generator hears hundreds of streams at once."""

from __future__ import annotations

_PAGE_HEADER_BYTES = 27  # RFC 3533 section 6; the lacing values follow
_SEGMENTS_AT = 26
_FULL_SEGMENT = 255  # a packet goes on in the next segment

_HEADS = (b"OpusHead", b"OpusTags")

# RFC 6716 section 3.1: a packet's first byte says how long its frames are, in samples at 24 kHz.
_SILK_SAMPLES = (240, 480, 960, 1440)
_HYBRID_SAMPLES = (240, 480)
_CELT_SAMPLES = (60, 120, 240, 480)


class NotOpus(ValueError):
    """The server's audio is not whole Ogg pages with Opus packets."""


def samples_in(pages: bytes) -> int:
    """Samples at 24 kHz in whole pages. A packet counts on the page that it ends on. Raises NotOpus."""
    samples, at = 0, 0
    while at < len(pages):
        if pages[at : at + 4] != b"OggS" or at + _PAGE_HEADER_BYTES > len(pages):
            raise NotOpus("the server's audio is not Ogg pages")
        body = at + _PAGE_HEADER_BYTES + pages[at + _SEGMENTS_AT]
        lacing = pages[at + _PAGE_HEADER_BYTES : body]
        start = body
        for length in lacing:
            body += length
            if length < _FULL_SEGMENT:
                samples += _packet_samples(pages[start:body])
                start = body
        if body > len(pages):
            raise NotOpus("the server sent a part of an Ogg page")
        at = body
    return samples


def _packet_samples(packet: bytes) -> int:
    if not packet or packet.startswith(_HEADS):
        return 0
    configuration, code = packet[0] >> 3, packet[0] & 3
    if code == 3:
        if len(packet) < 2:
            raise NotOpus("an Opus packet ends before its count of frames")
        frames = packet[1] & 0x3F
    else:
        frames = 1 if code == 0 else 2
    return frames * _frame_samples(configuration)


def _frame_samples(configuration: int) -> int:
    if configuration < 12:
        return _SILK_SAMPLES[configuration % 4]
    if configuration < 16:
        return _HYBRID_SAMPLES[configuration % 2]
    return _CELT_SAMPLES[configuration % 4]

"""What can be wrong with a client's audio, and with this machine's ability to handle it.

The tree:

    AudioError                 the client's bytes are not what they claim to be
    ├── OggError               a page: capture pattern, checksum, lacing, a stream that is not Opus
    ├── OpusPacketError        a packet: libopus refuses it
    └── PcmError               raw samples: an odd number of bytes, an unknown rate
    LibopusMissingError        this machine has no libopus; the message names the package
"""

from __future__ import annotations


class AudioError(ValueError):
    """The client's audio cannot be read. The message is a sentence for the client."""


class OggError(AudioError):
    """The bytes are no readable Ogg-Opus stream (RFC 3533, RFC 7845)."""


class OpusPacketError(AudioError):
    """libopus refuses a packet."""


class PcmError(AudioError):
    """The bytes are no PCM16 of a rate we know."""


class LibopusMissingError(RuntimeError):
    """There is no libopus to load."""

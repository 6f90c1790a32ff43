"""Opus packets ↔ 24 kHz mono PCM, through opuslib's api layer, with a libopus that is found or brought along.

opuslib looks for libopus once, when it is first imported, with `ctypes.util.find_library`. Where the system has
none, PyAV's wheel carries one; it is handed over by answering that one question differently. opuslib's high-level
classes are not used: `decode(None)` and the FEC setter raise there, and each call copies its samples through a
Python list. `opuslib.api` is a thin, sound layer over the C functions.

Cost of one 80 ms frame of speech at complexity 0 / 5 / 10, measured: encoding 0.18 / 0.41 / 0.79 ms, decoding
0.08 ms. The ingress pays it per stream, beside the replica's 80 ms and not out of them: docs/decisions/opus.md.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import threading
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from serving.audio.errors import LibopusMissingError, OpusPacketError

Pcm: TypeAlias = npt.NDArray[np.int16]

RATE_HZ = 24_000
PACKET_MS = 20
DEFAULT_COMPLEXITY = 5
DEFAULT_BITRATE = 32_000  # transparent for 24 kHz mono voice; the published server leaves libopus at about this

_LONGEST_PACKET_MS = 120  # RFC 6716 section 3.2.5, R5
_LARGEST_PACKET = 1275 * 3 + 7  # bytes of a 60 ms packet, the longest that one opus_encode call makes
_APPLICATION_VOIP = 2048  # favours speech intelligibility; opus_defines.h
_BUNDLED = ("../av.libs/libopus-*", ".dylibs/libopus.*", "../av.libs/opus*.dll", "../av.libs/libopus*.dll")
_import_lock = threading.Lock()


class _Api(NamedTuple):
    """opuslib's modules, imported."""

    decoder: Any
    encoder: Any
    ctl: Any
    location: str


def find_libopus() -> str | None:
    """Path or soname of the system's libopus, else of the one in PyAV's wheel, else None."""
    system = ctypes.util.find_library("opus")
    if system is not None:
        return system
    spec = importlib.util.find_spec("av")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    for pattern in _BUNDLED:
        for path in sorted(package.glob(pattern)):
            return str(path.resolve())
    return None


@cache
def _api() -> _Api:
    location = find_libopus()
    if location is None:
        raise LibopusMissingError(
            "libopus was not found. Install it: `apt-get install libopus0` (Debian, Ubuntu), `dnf install opus` "
            "(Fedora), `brew install opus` (macOS); or `pip install av`, whose wheel carries one."
        )
    with _import_lock:
        asked = ctypes.util.find_library

        def answer(name: str) -> str | None:
            return location if name == "opus" else asked(name)

        ctypes.util.find_library = answer
        try:
            with warnings.catch_warnings():
                # opuslib compares numbers with `is`, which Python warns of when it compiles the file.
                warnings.simplefilter("ignore", SyntaxWarning)
                modules = _import_opuslib()
        finally:
            ctypes.util.find_library = asked
    return _Api(*modules, location)


def _import_opuslib() -> tuple[ModuleType, ModuleType, ModuleType]:
    import opuslib.api.ctl
    import opuslib.api.decoder
    import opuslib.api.encoder

    return opuslib.api.decoder, opuslib.api.encoder, opuslib.api.ctl


def libopus_location() -> str:
    """Which libopus is in use. Raises LibopusMissingError with the package to install."""
    return _api().location


class OpusDecoder:
    """One stream's decoder: packets of 2.5-120 ms, made at any rate, mono or stereo, to mono PCM at `rate_hz`."""

    def __init__(self, rate_hz: int = RATE_HZ) -> None:
        """`rate_hz`: 8, 12, 16, 24 or 48 kHz; Opus decodes straight to it. Raises LibopusMissingError."""
        self._state: Any = None  # first: close() runs even where the next line raises
        self._api = _api()
        self._capacity = rate_hz * _LONGEST_PACKET_MS // 1000
        self._buffer = np.zeros(self._capacity, dtype=np.int16)
        self._out = self._buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int16))
        self._state = self._api.decoder.create_state(rate_hz, 1)

    def set_gain(self, q8_db: int) -> None:
        """Apply an Ogg header's output gain (1/256 dB); RFC 7845 section 5.1 demands it of every player."""
        self._api.decoder.decoder_ctl(self._state, self._api.ctl.set_gain, q8_db)

    def decode(self, packet: bytes) -> Pcm:
        """One packet → its samples [60 … 2880] int16 at 24 kHz. Raises OpusPacketError."""
        if not packet:
            raise OpusPacketError("an Opus packet is empty")
        written = self._api.decoder.libopus_decode(self._state, packet, len(packet), self._out, self._capacity, 0)
        if written < 0:
            raise OpusPacketError(f"an Opus packet of {len(packet)} bytes cannot be decoded")
        return self._buffer[:written].copy()

    def close(self) -> None:
        """Free libopus's state. Safe to call twice."""
        state, self._state = self._state, None
        if state is not None:
            self._api.decoder.destroy(state)

    def __del__(self) -> None:
        self.close()


class OpusEncoder:
    """One stream's encoder: mono PCM at `rate_hz` to packets of 20 ms, tuned for speech."""

    def __init__(
        self, rate_hz: int = RATE_HZ, *, complexity: int = DEFAULT_COMPLEXITY, bitrate: int = DEFAULT_BITRATE
    ) -> None:
        """`complexity` 0 (cheapest) to 10; `bitrate` in bit/s. Raises ValueError, LibopusMissingError."""
        self._state: Any = None
        if not 0 <= complexity <= 10:
            raise ValueError(f"Opus complexity is 0 to 10, not {complexity}")
        self._api = _api()
        self._rate_hz = rate_hz
        self.packet_samples = rate_hz * PACKET_MS // 1000
        self._packet = ctypes.create_string_buffer(_LARGEST_PACKET)
        self._state = self._api.encoder.create_state(rate_hz, 1, _APPLICATION_VOIP)
        self._control(self._api.ctl.set_complexity, complexity)
        self._control(self._api.ctl.set_bitrate, bitrate)

    def _control(self, request: Any, value: int | None = None) -> int:
        answer = self._api.encoder.encoder_ctl(self._state, request, value)
        return 0 if answer is None else int(answer)

    @property
    def complexity(self) -> int:
        """As libopus has it."""
        return self._control(self._api.ctl.get_complexity)

    @property
    def lookahead_48k(self) -> int:
        """Samples at 48 kHz that the encoder delays its input by: an Ogg header's pre-skip."""
        return self._control(self._api.ctl.get_lookahead) * 48_000 // self._rate_hz

    def encode(self, pcm: Pcm) -> list[bytes]:
        """PCM [k * packet_samples] int16 → k packets. Raises ValueError for any other length."""
        if pcm.dtype != np.int16 or pcm.ndim != 1 or len(pcm) % self.packet_samples:
            raise ValueError(f"PCM must be int16 [k * {self.packet_samples}], not {pcm.dtype} {pcm.shape}")
        pcm = np.ascontiguousarray(pcm)
        return [
            self._encode_one(pcm[start : start + self.packet_samples])
            for start in range(0, len(pcm), self.packet_samples)
        ]

    def _encode_one(self, pcm: Pcm) -> bytes:
        size = self._api.encoder.libopus_encode(
            self._state,
            pcm.ctypes.data_as(ctypes.POINTER(ctypes.c_int16)),
            self.packet_samples,
            self._packet,
            _LARGEST_PACKET,
        )
        if size < 0:
            raise ValueError(f"libopus refused {self.packet_samples} samples (code {size})")
        return self._packet.raw[:size]

    def close(self) -> None:
        """Free libopus's state. Safe to call twice."""
        state, self._state = self._state, None
        if state is not None:
            self._api.encoder.destroy(state)

    def __del__(self) -> None:
        self.close()

"""A journal as bytes: a frame that tells whether they arrived whole, and a map that is read without believing it."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from actors.errors import JournalError

Rows = npt.NDArray[np.int16]

MAX_SEED = 2**63 - 1
MAX_TOKEN = 2**31 - 1
MAX_FRAME = 1 << 40
MAX_BYTES = 128 << 20  # a full day without an anchor and a long codec together
MAGIC, VERSION = b"PPXJ", 1
HEADER = struct.Struct("<4sHI")  # magic, version, CRC-32 of what follows


def sealed(fields: dict[str, Any]) -> bytes:
    """MAGIC, version, CRC-32 of the rest, then one msgpack map."""
    body: bytes = msgpack.packb(fields, unicode_errors="surrogatepass")  # JSON can carry half a surrogate into a role
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(body)) + body


def unsealed(blob: bytes) -> dict[str, Any]:
    """The map in a blob that `sealed` made, its frame checked. Raises JournalError."""
    if len(blob) > MAX_BYTES:
        raise JournalError(f"a journal has at most {MAX_BYTES} bytes, these are {len(blob)}")
    if len(blob) < HEADER.size or blob[: len(MAGIC)] != MAGIC:
        raise JournalError("these bytes are not a journal")
    _, version, crc = HEADER.unpack_from(blob)
    if version != VERSION:
        raise JournalError(f"this journal is of version {version}, this build reads version {VERSION}")
    body = memoryview(blob)[HEADER.size :]
    if zlib.crc32(body) != crc:
        raise JournalError("this journal was cut off or damaged on its way")
    try:
        fields = msgpack.unpackb(body, unicode_errors="surrogatepass", strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise JournalError("this journal holds no readable map") from error
    if not isinstance(fields, dict):
        raise JournalError("this journal holds no readable map")
    return fields


class Fields:
    """Reads a journal's map, field by field, believing nothing. Raises JournalError for what is missing or wrong."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def _get(self, name: str, kind: type) -> Any:
        value = self._fields.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise JournalError(f"this journal's field '{name}' is missing or of the wrong kind")
        return value

    def text(self, name: str) -> str:
        text: str = self._get(name, str)
        return text

    def flag(self, name: str) -> bool:
        """False where it is missing: builds before it had none."""
        value = self._fields.get(name, False)
        if not isinstance(value, bool):
            raise JournalError(f"this journal's field '{name}' is of the wrong kind")
        return value

    def number(self, name: str, most: int = MAX_FRAME) -> int:
        number: int = self._get(name, int)
        if not 0 <= number <= most:
            raise JournalError(f"this journal's field '{name}' is {number}, not within 0 … {most}")
        return number

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        return _finite(name, self._get(name, list), count)

    def tokens(self, name: str) -> tuple[int, ...] | None:
        if self._fields.get(name) is None:
            return None
        values: list[Any] = self._get(name, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_TOKEN for v in values):
            raise JournalError(f"this journal's field '{name}' does not hold tokens")
        return tuple(values)

    def blob(self, name: str, width: int, most: int) -> Rows:
        """[n, width] int16, n ≤ most."""
        data: bytes = self._get(name, bytes)
        if len(data) % (2 * width) or len(data) > 2 * width * most:
            raise JournalError(f"this journal's field '{name}' has {len(data)} bytes, not up to {most} × {2 * width}")
        return np.frombuffer(data, dtype="<i2").astype(np.int16).reshape(-1, width)

    def controls(self) -> Iterator[tuple[int, str, tuple[float, ...]]]:
        """Frame, kind and values of each."""
        for entry in self._get("controls", list):
            if not (isinstance(entry, list) and len(entry) == 3):
                raise JournalError("this journal holds an unreadable control")
            frame, kind, values = entry
            if not (isinstance(frame, int) and isinstance(kind, str) and isinstance(values, list) and frame >= 0):
                raise JournalError("this journal holds an unreadable control")
            yield frame, kind, _finite("controls", values, len(values))


def _finite(name: str, values: list[Any], count: int) -> tuple[float, ...]:
    known = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
    if len(known) != count or len(values) != count:
        raise JournalError(f"this journal's field '{name}' does not hold {count} numbers")
    return tuple(known)

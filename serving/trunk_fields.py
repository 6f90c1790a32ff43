"""The fields of the trunk's messages, checked one by one: a bad one would otherwise surface deep inside a stage.

Each of these returns the value as what it has to be, or raises TrunkProtocolError, which names the field.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_TEXT_BYTES = 64 << 10  # a role of 4,000 characters is 16 kB at most


class TrunkProtocolError(Exception):
    """What arrived is not of this protocol. The connection is closed: its sender is broken or of another version."""


def text_of(value: Any, name: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8."""
    if not isinstance(value, str) or len(value) > limit or len(value.encode()) > limit:
        raise TrunkProtocolError(f"{name} must be text of at most {limit} bytes")
    return value


def count_of(value: Any, name: str) -> int:
    """0 … 2**63 - 1."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TrunkProtocolError(f"{name} must be an integer in 0 … 2**63 - 1, not {shown(value)}")
    return value


def flag_of(value: Any, name: str) -> bool:
    if type(value) is not bool:
        raise TrunkProtocolError(f"{name} must be true or false, not {shown(value)}")
    return value


def tokens_of(value: Any) -> tuple[int, ...] | None:
    """A role's tokens, where there are any."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_TEXT_BYTES:
        raise TrunkProtocolError(f"role_tokens must be a list of at most {MAX_TEXT_BYTES} tokens")
    return tuple(count_of(token, "role_tokens") for token in value)


def number_of(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not np.isfinite(value):
        raise TrunkProtocolError(f"{name} must be a finite number, not {shown(value)}")
    return float(value)


def array_of(value: Any, length: int, name: str) -> npt.NDArray[np.int16]:
    """[length] int16, which travel as little-endian bytes."""
    if not isinstance(value, bytes) or len(value) != 2 * length:
        raise TrunkProtocolError(f"{name} must be {length} int16")
    return np.frombuffer(value, dtype="<i2").astype(np.int16, copy=False)


def shown(value: Any) -> str:
    """A value as an error may quote it."""
    said = repr(value)
    return said if len(said) <= 60 else said[:57] + "..."

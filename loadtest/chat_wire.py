"""The bytes of /api/chat as a client sees them, without a socket: one byte of kind, then the payload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit


class Kind(IntEnum):
    HANDSHAKE = 0  # from the server, once the prompt is in the KV cache
    AUDIO = 1  # Ogg-Opus pages, 24 kHz mono, both ways
    TEXT = 2  # UTF-8, one piece of the agent's words
    CONTROL = 3
    METADATA = 4  # JSON
    ERROR = 5  # UTF-8, a sentence
    PING = 6


class WireError(ValueError):
    """The server sent something that /api/chat does not know."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Who is to be talked to, and how. `query` holds further parameters, e.g. {"audio_temperature": "0"}."""

    voice: str = ""
    role: str = ""
    seed: int | None = None
    key: str | None = None
    query: Mapping[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the server. `text` is set for TEXT and ERROR, `metadata` for METADATA."""

    kind: Kind
    payload: bytes
    text: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def chat_url(server: str, options: ChatOptions) -> str:
    """The WebSocket's address for a server given as http(s)://, ws(s):// or host:port.

    Raises ValueError if `server` is none of these.
    """
    parts = urlsplit(server if "://" in server else f"http://{server}")
    scheme = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise ValueError(f"{server!r} is no server's address; give one like http://localhost:8998")
    query = {"voice_prompt": options.voice, "text_prompt": options.role, **options.query}
    if options.seed is not None:
        query["seed"] = str(options.seed)
    given = {name: value for name, value in query.items() if value != ""}
    path = parts.path.rstrip("/")
    path = path if path.endswith("/api/chat") else f"{path}/api/chat"
    return urlunsplit((scheme, parts.netloc, path, urlencode(given), ""))


def audio_message(ogg: bytes) -> bytes:
    return bytes([Kind.AUDIO]) + ogg


def parse(message: bytes | str) -> Message:
    """Raises WireError on text frames, empty messages, unknown kinds and payloads that are not what they say."""
    if isinstance(message, str):
        raise WireError("the server sent a text frame; /api/chat is binary")
    if not message:
        raise WireError("the server sent an empty message")
    try:
        kind = Kind(message[0])
    except ValueError:
        raise WireError(f"the server sent a message of unknown kind {message[0]}") from None
    payload = message[1:]
    try:
        if kind in (Kind.TEXT, Kind.ERROR):
            return Message(kind, payload, text=payload.decode())
        if kind is Kind.METADATA:
            metadata = json.loads(payload)
            if not isinstance(metadata, dict):
                raise WireError("the server's metadata is no JSON object")
            return Message(kind, payload, metadata=metadata)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WireError(f"the server's {kind.name.lower()} message cannot be read: {error}") from error
    return Message(kind, payload)

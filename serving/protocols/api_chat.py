"""`/api/chat`, NVIDIA's and Kyutai's binary WebSocket protocol, without I/O: bytes in → events, events → bytes out.

A message is one byte of kind and a payload:

    kind         from the client                              from the server
    0 handshake  accepted, means nothing                      two zero bytes, once the prompt is in the KV cache
    1 audio      Ogg-Opus pages; PCM16 with audio=pcm         the same
    2 text       accepted, not applied (listed in metadata)   UTF-8, one piece of the agent's words
    3 control    0 start, 1 end turn, 2 pause, 3 restart      never
    4 metadata   JSON, accepted, not applied                  JSON: what this conversation runs with
    5 error      accepted, logged                             UTF-8, one sentence; a close follows
    6 ping       answered with a ping of the same payload     the answer

Kinds above 6 are never sent: the published web client throws on them.

A client of ours may ask for a resume token (`resume=1`, docs/decisions/resume.md): the metadata brings it, and when the
socket is lost, `resume=TOKEN&missed=replay|skip&have=FRAMES` goes on where it was, at any ingress.

What a client may do wrong, and what it gets: one message of kind 5 with a sentence, then a close code.

    a text frame; a kind above 6                                        1003 unsupported data
    an empty message; a control that is none; text or JSON that does
    not parse; a truncated or corrupt Ogg page or Opus packet           1007 invalid payload
    an unknown voice; a role that is too long; a number that is none
    or out of range; no key; too many calls of one tenant; silence      1008 policy violation
    a message above the size limit                                      1009 too big
    the server fails                                                    1011 internal error
    the server drains                                                   1012 service restart
    no slot is free                                                     1013 try again later

Never 1000 for a limit: LiveKit's plugin takes it for a normal end and reconnects at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, TypeAlias

UNSUPPORTED_DATA = 1003
INVALID_PAYLOAD = 1007
MESSAGE_TOO_BIG = 1009

_REASON_BYTES = 123  # what a close frame holds beside its code, RFC 6455 section 5.5
_HANDSHAKE = b"\x00\x00\x00"  # kind, protocol version 0, model 0


class Kind(IntEnum):
    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6


class Control(IntEnum):
    """START lets frames flow again after PAUSE; END_TURN fills the frame that waits with silence and sends it;
    PAUSE drops the user's audio, so that the agent's clock stands still; RESTART begins the same conversation anew."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


class ProtocolError(ValueError):
    """The client broke the protocol. The message is the sentence it is sent, `close_code` what follows."""

    def __init__(self, message: str, close_code: int) -> None:
        super().__init__(message, close_code)
        self.message = message
        self.close_code = close_code


@dataclass(frozen=True, slots=True)
class Hello:
    """The client's handshake; nothing follows from it."""


@dataclass(frozen=True, slots=True)
class Audio:
    """A payload for the conversation's audio decoder."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Steer:
    control: Control


@dataclass(frozen=True, slots=True)
class Ping:
    payload: bytes


@dataclass(frozen=True, slots=True)
class NotApplied:
    """A well-formed message that this server takes and does nothing with: text, metadata, a client's error."""

    what: str
    text: str


Event: TypeAlias = Hello | Audio | Steer | Ping | NotApplied


def parse_message(message: bytes | str, max_bytes: int) -> Event:
    """One WebSocket message → its event. Raises ProtocolError, and nothing else, for whatever a client sends."""
    if len(message) > max_bytes:
        raise ProtocolError(
            f"A message of {len(message)} bytes is longer than the {max_bytes} allowed.", MESSAGE_TOO_BIG
        )
    if isinstance(message, str):
        raise ProtocolError(
            "This is a binary protocol: text frames are not understood; the first byte is the kind.", UNSUPPORTED_DATA
        )
    if not message:
        raise ProtocolError("An empty message has no kind.", INVALID_PAYLOAD)
    try:
        kind = Kind(message[0])
    except ValueError:
        raise ProtocolError(f"Message kind {message[0]} is not known; kinds are 0 to 6.", UNSUPPORTED_DATA) from None
    payload = message[1:]
    match kind:
        case Kind.HANDSHAKE:
            return Hello()
        case Kind.AUDIO:
            return Audio(payload)
        case Kind.CONTROL:
            return Steer(_control(payload))
        case Kind.PING:
            return Ping(payload)
        case Kind.METADATA:
            return NotApplied("metadata", _json(payload))
        case Kind.TEXT | Kind.ERROR:
            return NotApplied(kind.name.lower(), _text(payload, kind))


def _control(payload: bytes) -> Control:
    try:
        (value,) = payload
        return Control(value)
    except ValueError:
        raise ProtocolError(
            "A control message holds one byte: 0 start, 1 end turn, 2 pause, 3 restart.", INVALID_PAYLOAD
        ) from None


def _text(payload: bytes, kind: Kind) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"A message of kind {kind.value} holds UTF-8, and this is none.", INVALID_PAYLOAD) from None


def _json(payload: bytes) -> str:
    text = _text(payload, Kind.METADATA)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("A message of kind 4 holds JSON, and this is none.", INVALID_PAYLOAD) from None
    return text


def handshake() -> bytes:
    """The prompt is in: audio is welcome."""
    return _HANDSHAKE


def audio(payload: bytes) -> bytes:
    return bytes((Kind.AUDIO,)) + payload


def text(piece: str) -> bytes:
    """`piece`: one SentencePiece piece with its word boundary already a space."""
    return bytes((Kind.TEXT,)) + piece.encode()


def metadata(content: dict[str, Any]) -> bytes:
    return bytes((Kind.METADATA,)) + json.dumps(content, ensure_ascii=False).encode()


def error(sentence: str) -> bytes:
    return bytes((Kind.ERROR,)) + sentence.encode()


def ping(payload: bytes) -> bytes:
    return bytes((Kind.PING,)) + payload


def close_reason(sentence: str) -> str:
    """As much of a sentence as a close frame holds, cut between characters."""
    return sentence.encode()[:_REASON_BYTES].decode(errors="ignore")


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a client that asked for it (`resume=1`) is told beside the rest.

    It gets one message of kind 1 for each frame of the agent, an empty one where there is nothing to be heard; so it
    always knows how many it has had: `first_frame` and those that came since.
    """

    resume_token: str  # for `resume=…` after this socket is lost; good for one use
    resumed: bool  # whether this socket goes on with a conversation that had begun on another
    first_frame: int  # the number of the first frame on this socket
    heard_frames: int  # of the client's own, that the server has: who kept what it said last says it again from there


def conversation_metadata(
    *,
    session: str,
    voice: str,
    seed: int,
    text_temperature: float,
    text_top_k: int,
    audio_temperature: float,
    audio_top_k: int,
    model: str,
    trained: bool,
    notice: str = "",
    audio_format: str,
    not_applied: Sequence[str],
    resume: Resumption | None = None,
) -> dict[str, Any]:
    """What the server tells of a conversation, once, right after the handshake.

    The first block has the names and types that Kyutai's and NVIDIA's web clients show on their page; they drop the
    whole message if one is missing. The values there that this server does not have are neutral ones: no pad
    multiplier, no repetition penalty, no Rust build.
    """
    rust_build = (
        "build_timestamp", "build_date", "git_branch", "git_timestamp", "git_date",
        "git_hash", "git_describe", "rustc_host_triple", "rustc_version", "cargo_target_triple",
    )  # fmt: skip
    return {
        "text_temperature": text_temperature,
        "text_topk": text_top_k,
        "audio_temperature": audio_temperature,
        "audio_topk": audio_top_k,
        "pad_mult": 0.0,
        "repetition_penalty": 1.0,
        "repetition_penalty_context": 0,
        "lm_model_file": model,
        "instance_name": "personaplex-serving",
        "build_info": dict.fromkeys(rust_build, ""),
        # From here on our own.
        "session": session,
        "voice": voice,
        "seed": str(seed),  # a string: JavaScript's numbers end at 2**53
        "trained": trained,
        "notice": notice,
        "audio": audio_format,
        "not_applied": list(not_applied),
        **({} if resume is None else asdict(resume)),
    }

"""The trunk's language, without I/O: messages ↔ msgpack, one batch a WebSocket message, versioned and bounded.

A message is an array [kind, field, …]. A newer build may append fields, which an older one ignores; anything
else is a new version, and the hello settles on the highest that both sides speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from actors.journal_parts import MAX_PARTS, PART_BYTES
from actors.messages import (
    CloseRequest,
    Down,
    Failed,
    FrameIn,
    FrameOut,
    JournalAsk,
    JournalPart,
    Move,
    Need,
    OpenRequest,
    Ready,
    Up,
)
from graphs.stages import FrameKey, Sampling, SessionSpec
from serving.trunk_fields import (
    MAX_TEXT_BYTES,
    TrunkProtocolError,
    array_of,
    count_of,
    flag_of,
    number_of,
    shown,
    text_of,
    tokens_of,
)

VERSIONS = (1, 2)  # 2: conversations may change hands (JournalPart, JournalAsk, Move)
SECRET_HEADER = "x-personaplex-trunk"

MAX_BATCH_BYTES = 8 << 20  # 256 slots × 4.1 kB is 1 MB; eight of them is a stall, not traffic
MAX_BATCH_ITEMS = 8192
MAX_ID_BYTES = 256

FRAME_SAMPLES = 1920
AGENT_CODES = 8
STREAMS = 17

_OPEN, _FRAME_IN, _CLOSE, _JOURNAL_ASK = 1, 2, 3, 4
_READY, _FRAME_OUT, _FAILED, _NEED, _MOVE = 16, 17, 18, 19, 20
_JOURNAL_PART = 32  # both ways

Wire = list[Any]


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message each way. `versions` are all that the sender speaks; `name` is the ingress or replica."""

    name: str
    versions: tuple[int, ...] = VERSIONS


def encode_hello(hello: Hello) -> bytes:
    return _pack({"personaplex-trunk": list(hello.versions), "name": hello.name})


def decode_hello(data: bytes) -> Hello:
    """Raises TrunkProtocolError for anything but a hello."""
    document = _unpack(data)
    if not isinstance(document, dict) or "personaplex-trunk" not in document:
        raise TrunkProtocolError("expected a hello")
    versions = document["personaplex-trunk"]
    if not isinstance(versions, list) or not versions or not all(type(v) is int for v in versions):
        raise TrunkProtocolError("a hello must list the versions its sender speaks")
    return Hello(text_of(document.get("name"), "name", MAX_ID_BYTES), tuple(versions))


def agree(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """The version to speak. Raises TrunkProtocolError when there is none."""
    common = set(mine) & set(theirs)
    if not common:
        raise TrunkProtocolError(f"no common trunk version: here {list(mine)}, there {list(theirs)}")
    return max(common)


def since(message: Up | Down) -> int:
    """The version a message belongs to. It must not be sent to a peer of an older one, which would close the trunk
    over a kind it does not know, or begin anew what was to be continued."""
    if isinstance(message, OpenRequest):
        return 2 if message.adopt or message.journal_bytes else 1
    return 2 if isinstance(message, JournalPart | JournalAsk | Move) else 1


def owner_of(message: Down) -> tuple[str, int]:
    """The session and epoch that a replica's message is for."""
    if isinstance(message, FrameOut | Need):
        return message.key.session, message.key.epoch
    return message.session, message.epoch


def encode_batch(messages: Iterable[Up | Down]) -> bytes:
    """One WebSocket message for all of them, in order. See `since`."""
    return _pack([_ENCODERS[type(message)](message) for message in messages])


def decode_up(data: bytes) -> list[Up]:
    """What an ingress sent. Raises TrunkProtocolError for anything else."""
    return [_decode(item, _UP) for item in _items(data)]


def decode_down(data: bytes) -> list[Down]:
    """What a replica sent. Raises TrunkProtocolError for anything else."""
    return [_decode(item, _DOWN) for item in _items(data)]


# Encoding. Arrays travel as little-endian int16.


def _encode_open(m: OpenRequest) -> Wire:
    s = m.spec.sampling
    sampling = [s.text_temperature, s.text_top_k, s.audio_temperature, s.audio_top_k]
    tokens = None if m.spec.role_tokens is None else list(m.spec.role_tokens)
    spec = [m.spec.voice, m.spec.role, m.spec.seed, sampling, tokens]
    return [
        *(_OPEN, m.session, m.epoch, m.tenant, m.ingress, *spec),
        *(m.resumable, m.serial, m.journal_bytes, m.adopt),
    ]


def _encode_ready(m: Ready) -> Wire:
    prompt = [m.slot, m.prompt_frames, m.prompt_hash, m.ready_ms]
    return [_READY, m.session, m.epoch, *prompt, m.numerics_id, m.next_frame, m.exact]


def _encode_frame_out(m: FrameOut) -> Wire:
    arrays = [_raw(m.pcm), _raw(m.codes), _raw(m.user_codes), _raw(m.journal_row)]
    begun = b"" if m.next_column is None else _raw(m.next_column)
    return [_FRAME_OUT, *m.key, m.text_token, m.text, m.replica_ms, *arrays, begun, m.first_row]


_ENCODERS: dict[type, Callable[[Any], Wire]] = {
    OpenRequest: _encode_open,
    FrameIn: lambda m: [_FRAME_IN, *m.key, _raw(m.pcm)],
    CloseRequest: lambda m: [_CLOSE, m.session, m.epoch, m.reason],
    JournalAsk: lambda m: [_JOURNAL_ASK, m.session, m.epoch, m.first_row],
    JournalPart: lambda m: [_JOURNAL_PART, m.session, m.epoch, m.index, m.count, m.data],
    Ready: _encode_ready,
    FrameOut: _encode_frame_out,
    Failed: lambda m: [_FAILED, m.session, m.epoch, m.code, m.message],
    Need: lambda m: [_NEED, *m.key, m.need_frame],
    Move: lambda m: [_MOVE, m.session, m.epoch, m.reason],
}


def _raw(array: npt.NDArray[np.int16]) -> bytes:
    return array.astype("<i2", copy=False).tobytes()


def _pack(document: Any) -> bytes:
    packed: bytes = msgpack.packb(document, use_bin_type=True)
    return packed


# Decoding: every field is checked, since a bad one would otherwise surface deep inside a stage.


def _decode_open(f: Wire) -> OpenRequest:
    sampling = f[7]
    if not isinstance(sampling, list) or len(sampling) < 4:
        raise TrunkProtocolError("sampling must be a list of four")
    spec = SessionSpec(
        voice=text_of(f[4], "voice", MAX_ID_BYTES),
        role=text_of(f[5], "role", MAX_TEXT_BYTES),
        seed=count_of(f[6], "seed"),
        sampling=Sampling(
            number_of(sampling[0], "text_temperature"),
            count_of(sampling[1], "text_top_k"),
            number_of(sampling[2], "audio_temperature"),
            count_of(sampling[3], "audio_top_k"),
        ),
        role_tokens=tokens_of(f[8]),
    )
    session, epoch = _owner(f)
    tenant, ingress = text_of(f[2], "tenant", MAX_ID_BYTES), text_of(f[3], "ingress", MAX_ID_BYTES)
    if len(f) < 13:  # from a build before version 2
        return OpenRequest(session, epoch, tenant, ingress, spec)
    return OpenRequest(
        session=session,
        epoch=epoch,
        tenant=tenant,
        ingress=ingress,
        spec=spec,
        resumable=flag_of(f[9], "resumable"),
        serial=count_of(f[10], "serial"),
        journal_bytes=count_of(f[11], "journal_bytes"),
        adopt=flag_of(f[12], "adopt"),
    )


def _decode_part(f: Wire) -> JournalPart:
    index, count, data = count_of(f[2], "index"), count_of(f[3], "count"), f[4]
    if not 0 < count <= MAX_PARTS or index >= count:
        raise TrunkProtocolError(f"part {index} of {count} is not one of 1 … {MAX_PARTS} parts")
    if not isinstance(data, bytes) or len(data) > PART_BYTES:
        raise TrunkProtocolError(f"a part of a journal is at most {PART_BYTES} bytes")
    return JournalPart(*_owner(f), index, count, data)


def _decode_frame_out(f: Wire) -> FrameOut:
    return FrameOut(
        key=_key(f),
        pcm=array_of(f[6], FRAME_SAMPLES, "pcm"),
        text_token=count_of(f[3], "text_token"),
        text=text_of(f[4], "text", MAX_TEXT_BYTES),
        codes=array_of(f[7], AGENT_CODES, "codes"),
        user_codes=array_of(f[8], AGENT_CODES, "user_codes"),
        journal_row=array_of(f[9], STREAMS, "journal_row"),
        replica_ms=number_of(f[5], "replica_ms"),
        # Not from builds before these two; a journal does without, at the price of a row more to run.
        next_column=array_of(f[10], STREAMS, "next_column") if len(f) > 11 and f[10] != b"" else None,
        first_row=count_of(f[11], "first_row") if len(f) > 11 else 0,
    )


def _decode_ready(f: Wire) -> Ready:
    session, epoch = _owner(f)
    prompt_hash, ready_ms = text_of(f[4], "prompt_hash", MAX_ID_BYTES), number_of(f[5], "ready_ms")
    slot, frames = count_of(f[2], "slot"), count_of(f[3], "frames")
    if len(f) < 9:  # from a build before version 2
        return Ready(session, epoch, slot, frames, prompt_hash, ready_ms)
    numerics_id = text_of(f[6], "numerics_id", MAX_TEXT_BYTES)
    next_frame, exact = count_of(f[7], "next_frame"), flag_of(f[8], "exact")
    return Ready(session, epoch, slot, frames, prompt_hash, ready_ms, numerics_id, next_frame, exact)


# kind → (number of fields after it, decoder)
_UP: dict[int, tuple[int, Callable[[Wire], Any]]] = {
    _OPEN: (9, _decode_open),
    _FRAME_IN: (4, lambda f: FrameIn(_key(f), array_of(f[3], FRAME_SAMPLES, "pcm"))),
    _CLOSE: (3, lambda f: CloseRequest(*_owner(f), text_of(f[2], "reason", MAX_TEXT_BYTES))),
    _JOURNAL_ASK: (3, lambda f: JournalAsk(*_owner(f), count_of(f[2], "first_row"))),
    _JOURNAL_PART: (5, _decode_part),
}
_DOWN: dict[int, tuple[int, Callable[[Wire], Any]]] = {
    _READY: (6, _decode_ready),
    _FRAME_OUT: (10, _decode_frame_out),
    _FAILED: (
        4,
        lambda f: Failed(*_owner(f), text_of(f[2], "code", MAX_ID_BYTES), text_of(f[3], "message", MAX_TEXT_BYTES)),
    ),
    _NEED: (4, lambda f: Need(_key(f), count_of(f[3], "need_frame"))),
    _MOVE: (3, lambda f: Move(*_owner(f), text_of(f[2], "reason", MAX_TEXT_BYTES))),
    _JOURNAL_PART: (5, _decode_part),
}


def _decode(item: Any, kinds: dict[int, tuple[int, Callable[[Wire], Any]]]) -> Any:
    if not isinstance(item, list) or not item or type(item[0]) is not int or item[0] not in kinds:
        raise TrunkProtocolError(f"unknown message {shown(item)}")
    fields, decoder = kinds[item[0]]
    if len(item) <= fields:
        raise TrunkProtocolError(f"message of kind {item[0]} has {len(item) - 1} fields, not {fields}")
    return decoder(item[1:])


def _items(data: bytes) -> list[Any]:
    document = _unpack(data)
    if not isinstance(document, list) or len(document) > MAX_BATCH_ITEMS:
        raise TrunkProtocolError(f"expected a list of at most {MAX_BATCH_ITEMS} messages")
    return document


def _unpack(data: bytes) -> Any:
    if len(data) > MAX_BATCH_BYTES:
        raise TrunkProtocolError(f"{len(data)} bytes are more than the {MAX_BATCH_BYTES} a batch may have")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True)
    # What msgpack raises for bad bytes: its own UnpackException tree is partly plain ValueError.
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise TrunkProtocolError(f"not msgpack: {type(error).__name__}") from error


def _owner(f: Wire) -> tuple[str, int]:
    return text_of(f[0], "session", MAX_ID_BYTES), count_of(f[1], "epoch")


def _key(f: Wire) -> FrameKey:
    return FrameKey(*_owner(f), count_of(f[2], "frame"))

"""The trunk's codec: what goes in comes out, and everything else is one documented error."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

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
from serving import trunk_protocol as wire
from serving.trunk_fields import TrunkProtocolError

IDS = st.text(max_size=40)
TEXTS = st.text(max_size=200)
COUNTS = st.integers(0, 2**63 - 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
KEYS = st.builds(FrameKey, session=IDS, epoch=COUNTS, frame=COUNTS)


def int16(n: int) -> st.SearchStrategy[Any]:
    return arrays(np.int16, n)


PARTS = st.builds(
    lambda session, epoch, span, data: JournalPart(session, epoch, min(span), max(span) + 1, data),
    session=IDS,
    epoch=COUNTS,
    span=st.tuples(st.integers(0, MAX_PARTS - 1), st.integers(0, MAX_PARTS - 1)),
    data=st.binary(max_size=200),
)
UPS: st.SearchStrategy[Up] = st.one_of(
    st.builds(
        OpenRequest,
        session=IDS,
        epoch=COUNTS,
        tenant=IDS,
        ingress=IDS,
        spec=st.builds(
            SessionSpec,
            voice=IDS,
            role=TEXTS,
            seed=COUNTS,
            role_tokens=st.none() | st.lists(COUNTS, max_size=9).map(tuple),
            sampling=st.builds(
                Sampling, text_temperature=NUMBERS, text_top_k=COUNTS, audio_temperature=NUMBERS, audio_top_k=COUNTS
            ),
        ),
        resumable=st.booleans(),
        serial=COUNTS,
        journal_bytes=COUNTS,
        adopt=st.booleans(),
    ),
    PARTS,
    st.builds(JournalAsk, session=IDS, epoch=COUNTS, first_row=COUNTS),
    st.builds(FrameIn, key=KEYS, pcm=int16(1920)),
    st.builds(CloseRequest, session=IDS, epoch=COUNTS, reason=TEXTS),
)
DOWNS: st.SearchStrategy[Down] = st.one_of(
    st.builds(
        Ready,
        session=IDS,
        epoch=COUNTS,
        slot=COUNTS,
        prompt_frames=COUNTS,
        prompt_hash=IDS,
        ready_ms=NUMBERS,
        numerics_id=TEXTS,
        next_frame=COUNTS,
        exact=st.booleans(),
    ),
    PARTS,
    st.builds(Move, session=IDS, epoch=COUNTS, reason=TEXTS),
    st.builds(
        FrameOut,
        key=KEYS,
        pcm=int16(1920),
        text_token=COUNTS,
        text=TEXTS,
        codes=int16(8),
        user_codes=int16(8),
        journal_row=int16(17),
        replica_ms=NUMBERS,
    ),
    st.builds(Failed, session=IDS, epoch=COUNTS, code=IDS, message=TEXTS),
    st.builds(Need, key=KEYS, need_frame=COUNTS),
)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


@given(st.lists(UPS, max_size=5))
def test_what_an_ingress_sends_arrives(messages: list[Up]) -> None:
    received = wire.decode_up(wire.encode_batch(messages))
    assert len(received) == len(messages)
    assert all(same(a, b) for a, b in zip(messages, received, strict=True))


@given(st.lists(DOWNS, max_size=5))
def test_what_a_replica_sends_arrives(messages: list[Down]) -> None:
    received = wire.decode_down(wire.encode_batch(messages))
    assert len(received) == len(messages)
    assert all(same(a, b) for a, b in zip(messages, received, strict=True))


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_the_documented_error(data: bytes) -> None:
    for decode in (wire.decode_up, wire.decode_down, wire.decode_hello):
        try:
            decode(data)
        except TrunkProtocolError:
            continue


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=30,
)


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 4, 16, 17, 18, 19, 20, 32, 99]), st.lists(JSON_LIKE, max_size=14)),
        max_size=3,
    )
)
def test_well_formed_nonsense_raises_nothing_but_the_documented_error(items: list[tuple[int, list[Any]]]) -> None:
    data = msgpack.packb([[kind, *fields] for kind, fields in items])
    for decode in (wire.decode_up, wire.decode_down):
        try:
            decode(data)
        except TrunkProtocolError:
            continue


def test_fields_of_a_newer_build_are_ignored() -> None:
    data = msgpack.packb([[3, "s", 1, "why", "something new", 7]])
    assert wire.decode_up(data) == [CloseRequest("s", 1, "why")]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ([3, "s", 1], "fields"),
        ([3, "s", -1, "why"], "epoch"),
        ([3, "s", True, "why"], "epoch"),
        ([3, "s" * 300, 1, "why"], "session"),
        ([2, "s", 1, 0, b"\0" * 3839], "pcm"),
        ([16, "s", 1, 0, 0, "h", 1.0], "unknown"),  # a replica's message from an ingress
        ([1, "s", 1, "t", "i", "v", "r", 0, [float("nan"), 1, 1.0, 1], None], "text_temperature"),
        ([1, "s", 1, "t", "i", "v", "r", 2**63, [1.0, 1, 1.0, 1], None], "seed"),
        ([1, "s", 1, "t", "i", "v", "r", 1, [1.0, 1, 1.0, 1], None, 1, 0, 0, False], "resumable"),
        ([1, "s", 1, "t", "i", "v", "r", 1, [1.0, 1, 1.0, 1], None, True, -1, 0, False], "serial"),
        ([32, "s", 1, 3, 3, b""], "part 3 of 3"),
        ([32, "s", 1, 0, MAX_PARTS + 1, b""], "parts"),
        ([32, "s", 1, 0, 0, b""], "part 0 of 0"),
        ([32, "s", 1, 0, 1, b"0" * (PART_BYTES + 1)], "bytes"),
        ([32, "s", 1, 0, 1, "text"], "bytes"),
        ([20, "s", 1, "drain"], "unknown"),
    ],
)
def test_errors_name_the_field(item: list[Any], said: str) -> None:
    with pytest.raises(TrunkProtocolError, match=said):
        wire.decode_up(msgpack.packb([item]))


def test_limits() -> None:
    with pytest.raises(TrunkProtocolError, match="bytes"):
        wire.decode_up(b"\0" * (wire.MAX_BATCH_BYTES + 1))
    with pytest.raises(TrunkProtocolError, match="at most"):
        wire.decode_up(msgpack.packb([[3, "s", 1, ""]] * (wire.MAX_BATCH_ITEMS + 1)))


def test_hello_and_the_version_to_speak() -> None:
    assert wire.decode_hello(wire.encode_hello(wire.Hello("i-1", (1, 2)))) == wire.Hello("i-1", (1, 2))
    assert wire.agree((1, 2), (2, 3)) == 2
    with pytest.raises(TrunkProtocolError, match="no common"):
        wire.agree((1,), (2,))


SPEC = SessionSpec("voice", "role", 7)


def test_a_peer_of_version_1_is_sent_and_sends_what_it_always_did() -> None:
    """Its messages are the first fields of ours: it ignores the rest, and we do without what it does not send."""
    opening, ready = OpenRequest("s", 1, "t", "i", SPEC), Ready("s", 1, 2, 30, "hash", 1.5)
    (sent_open,) = msgpack.unpackb(wire.encode_batch([opening]))
    (sent_ready,) = msgpack.unpackb(wire.encode_batch([ready]))
    assert sent_open[:10] == [1, "s", 1, "t", "i", "voice", "role", 7, [0.7, 25, 0.8, 250], None]
    assert sent_ready[:7] == [16, "s", 1, 2, 30, "hash", 1.5]
    assert wire.decode_up(msgpack.packb([sent_open[:10]])) == [opening]
    assert wire.decode_down(msgpack.packb([sent_ready[:7]])) == [ready]


def test_what_a_peer_of_version_1_must_not_be_sent() -> None:
    """It would close the trunk over a kind it does not know, or begin anew what was to go on."""
    opening = OpenRequest("s", 1, "t", "i", SPEC, resumable=True, serial=3)
    for message in (opening, CloseRequest("s", 1, ""), Ready("s", 1, 0, 1, "h", 1.0, "n", 4), Failed("s", 1, "c", "")):
        assert wire.since(message) == 1
    for message in (
        replace(opening, adopt=True),
        replace(opening, journal_bytes=1),
        JournalAsk("s", 1),
        JournalPart("s", 1, 0, 1, b""),
        Move("s", 1, "drain"),
    ):
        assert wire.since(message) == 2


def test_a_full_part_fits_into_a_batch() -> None:
    part = JournalPart("s" * 200, 1, 0, 1, b"0" * PART_BYTES)
    assert wire.decode_up(wire.encode_batch([part])) == [part] == wire.decode_down(wire.encode_batch([part]))

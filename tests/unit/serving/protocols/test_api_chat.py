"""/api/chat, bytes to events and back: every kind, every way to get it wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocols import api_chat
from serving.protocols.api_chat import (
    Audio,
    Control,
    Hello,
    NotApplied,
    Ping,
    ProtocolError,
    Steer,
    close_reason,
    parse_message,
)

LIMIT = 1000


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (b"\x00\x00\x00", Hello()),
        (b"\x01OggS", Audio(b"OggS")),
        (b"\x01", Audio(b"")),
        (b"\x02hi", NotApplied("text", "hi")),
        (b"\x03\x00", Steer(Control.START)),
        (b"\x03\x01", Steer(Control.END_TURN)),
        (b"\x03\x02", Steer(Control.PAUSE)),
        (b"\x03\x03", Steer(Control.RESTART)),
        (b'\x04{"a":1}', NotApplied("metadata", '{"a":1}')),
        (b"\x05oh", NotApplied("error", "oh")),
        (b"\x06\x01\x02", Ping(b"\x01\x02")),
    ],
)
def test_what_a_client_may_say(message: bytes, event: api_chat.Event) -> None:
    assert parse_message(message, LIMIT) == event


@pytest.mark.parametrize(
    ("message", "code", "word"),
    [
        ("hello", 1003, "text frames"),
        ("", 1003, "text frames"),
        (b"", 1007, "no kind"),
        (b"\x07colour", 1003, "kind 7"),
        (b"\xff", 1003, "kind 255"),
        (b"\x01" + bytes(LIMIT), 1009, "1001 bytes"),
        ("x" * (LIMIT + 1), 1009, "longer"),
        (b"\x03", 1007, "one byte"),
        (b"\x03\x04", 1007, "one byte"),
        (b"\x03\x00\x00", 1007, "one byte"),
        (b"\x02\xff", 1007, "UTF-8"),
        (b"\x04{", 1007, "JSON"),
        (b"\x04\xff", 1007, "UTF-8"),
        (b"\x04" + b"[" * 900, 1007, "JSON"),
    ],
)
def test_what_a_client_may_get_wrong(message: bytes | str, code: int, word: str) -> None:
    with pytest.raises(ProtocolError, match=word) as caught:
        parse_message(message, LIMIT)
    assert caught.value.close_code == code


@given(st.one_of(st.binary(max_size=1200), st.text(max_size=50)))
def test_whatever_comes_is_an_event_or_a_protocol_error(message: bytes | str) -> None:
    refusal: ProtocolError | None = None
    try:
        parse_message(message, LIMIT)
    except ProtocolError as error:
        refusal = error
    if refusal is not None:
        assert refusal.close_code in {1003, 1007, 1009}
        assert refusal.message.endswith(".")


def test_what_the_server_says() -> None:
    assert api_chat.handshake() == b"\x00\x00\x00"
    assert api_chat.audio(b"OggS") == b"\x01OggS"
    assert api_chat.text(" größer") == b"\x02 gr\xc3\xb6\xc3\x9fer"
    assert api_chat.error("No.") == b"\x05No."
    assert api_chat.ping(b"\x07") == b"\x06\x07"


def test_metadata_has_what_the_published_page_shows() -> None:
    """Their page checks names and types with zod and drops the message if one is missing."""
    content = api_chat.conversation_metadata(
        session="s", voice="NATF2", seed=2**63 - 1, text_temperature=0.7, text_top_k=25, audio_temperature=0.8,
        audio_top_k=250, model="demo", trained=False, audio_format="opus", not_applied=("email",),
    )  # fmt: skip
    sent = json.loads(api_chat.metadata(content)[1:])
    assert sent == content
    numbers = ("text_temperature", "text_topk", "audio_temperature", "audio_topk", "pad_mult", "repetition_penalty")
    assert all(isinstance(sent[name], int | float) for name in (*numbers, "repetition_penalty_context"))
    assert sent["lm_model_file"] == "demo"
    assert len(sent["build_info"]) == 10
    assert sent["seed"] == "9223372036854775807"
    assert sent["not_applied"] == ["email"]
    assert sent["trained"] is False


@given(st.text(max_size=200))
def test_close_reasons_fit_and_stay_text(sentence: str) -> None:
    reason = close_reason(sentence)
    assert len(reason.encode()) <= 123
    assert sentence.startswith(reason)

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.chat_wire import ChatOptions, Kind, WireError, audio_message, chat_url, parse


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ("localhost:8998", "ws://localhost:8998/api/chat"),
        ("http://localhost:8998/", "ws://localhost:8998/api/chat"),
        ("https://talk.example/voice", "wss://talk.example/voice/api/chat"),
        ("ws://10.0.0.1:80/api/chat", "ws://10.0.0.1:80/api/chat"),
    ],
)
def test_the_address_follows_from_what_a_user_types(server: str, address: str) -> None:
    assert chat_url(server, ChatOptions()) == address


@pytest.mark.parametrize("server", ["ftp://localhost", "http://", ""])
def test_no_address_is_a_clear_error(server: str) -> None:
    with pytest.raises(ValueError, match="no server's address"):
        chat_url(server, ChatOptions())


def test_parameters_are_escaped_and_empty_ones_left_out() -> None:
    options = ChatOptions(voice="NATF2.pt", role="You & I = we?", seed=7, query={"audio_topk": "1", "text_topk": ""})
    query = parse_qs(urlsplit(chat_url("localhost", options)).query, strict_parsing=True)
    assert query == {
        "voice_prompt": ["NATF2.pt"],
        "text_prompt": ["You & I = we?"],
        "seed": ["7"],
        "audio_topk": ["1"],
    }


def test_seed_zero_is_a_seed() -> None:
    assert "seed=0" in chat_url("localhost", ChatOptions(seed=0))


def test_audio_carries_its_kind() -> None:
    assert parse(audio_message(b"OggS")) == parse(b"\x01OggS")
    assert parse(audio_message(b"OggS")).payload == b"OggS"


def test_text_errors_and_metadata_are_decoded() -> None:
    assert parse(b"\x02 h\xc3\xa9").text == " hé"
    assert parse(b"\x05no room").text == "no room"
    assert parse(b'\x04{"model": "demo"}').metadata == {"model": "demo"}
    assert parse(b"\x00").kind is Kind.HANDSHAKE


@pytest.mark.parametrize("message", ["text", b"", b"\x07", b"\xff", b"\x02\xff", b"\x04nope", b"\x04[1]"])
def test_what_is_no_message_is_a_wire_error(message: bytes | str) -> None:
    with pytest.raises(WireError, match="server"):
        parse(message)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_a_wire_error(message: bytes) -> None:
    try:
        parsed = parse(message)
    except WireError:
        return
    assert parsed.payload == message[1:]

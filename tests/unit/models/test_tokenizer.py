"""The text tokenizer: ids as PersonaPlex has them, roles in their wrapping, pieces for the transcript."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import TEXT_END_OF_PAD, TEXT_PAD
from models.demo_checkpoint import LM, TOKENIZER
from models.tokenizer import TextTokenizer, TokenizerError
from training.demo_tokenizer import train

tokenizer = TextTokenizer(TOKENIZER)


def text(tokens: list[int]) -> str:
    return "".join(tokenizer.piece(token) for token in tokens)


def test_the_committed_model_is_what_its_recipe_gives() -> None:
    assert TOKENIZER.read_bytes() == train()


def test_it_has_as_many_pieces_as_the_demo_model_has_tokens() -> None:
    assert tokenizer.size == LM.text_card


def test_padding_and_sentence_marks_are_not_shown() -> None:
    assert [tokenizer.piece(token) for token in (TEXT_END_OF_PAD, 1, 2, TEXT_PAD)] == ["", "", "", ""]


def test_pieces_join_to_the_text_again() -> None:
    sentence = "Hello, my name is Vera; how can I help you today?"
    assert text(tokenizer.encode(sentence)) == f" {sentence}"


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_any_ascii_survives(sentence: str) -> None:
    assert text(tokenizer.encode(sentence)).split() == sentence.split()


@given(st.text())
def test_any_role_has_an_encoding_without_special_tokens(role: str) -> None:
    tokens = tokenizer.encode_role(role)
    assert all(0 <= token < tokenizer.size for token in tokens)
    assert not {TEXT_END_OF_PAD, 1, 2, TEXT_PAD} & set(tokens)


def test_a_byte_of_a_longer_character_is_shown_as_such() -> None:
    assert text(tokenizer.encode("a\N{GREEK SMALL LETTER OMEGA}")).endswith("a\ufffd\ufffd")


def test_a_role_is_wrapped_once() -> None:
    wrapped = tokenizer.encode("<system> You are kind. <system>")
    assert tokenizer.encode_role("You are kind.") == wrapped
    assert tokenizer.encode_role("  You are kind.\n") == wrapped
    assert tokenizer.encode_role("<system> You are kind. <system>") == wrapped
    # One tag is both beginning and end of itself; that is no wrapping.
    assert tokenizer.encode_role("<system>") == tokenizer.encode("<system> <system> <system>")


@pytest.mark.parametrize("role", ["", "  ", "\n"])
def test_an_empty_role_has_no_tokens(role: str) -> None:
    assert tokenizer.encode_role(role) == []


@pytest.mark.parametrize("token", [-1, 2_000])
def test_an_id_it_does_not_have_is_refused(token: int) -> None:
    with pytest.raises(ValueError, match="not one of this tokenizer's"):
        tokenizer.piece(token)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        TextTokenizer(tmp_path / "missing.model")
    for content in (b"", b"something else"):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(TokenizerError, match="not a SentencePiece model"):
            TextTokenizer(tmp_path / "broken.model")

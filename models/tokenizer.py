"""Text to tokens and back: SentencePiece, with the wrapping PersonaPlex was trained to read roles in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.config import TEXT_END_OF_PAD, TEXT_PAD

SYSTEM_TAG = "<system>"
_WORD_START = "▁"  # SentencePiece's mark for a space before a piece
_UNFINISHED_BYTE = "\N{REPLACEMENT CHARACTER}"


class TokenizerError(ValueError):
    """The tokenizer file cannot be used; the message says why and what to do."""


class TextTokenizer:
    """A SentencePiece model. Ids are the language model's text tokens."""

    def __init__(self, path: str | Path) -> None:
        """Reads a `.model` file. Raises TokenizerError if it is none, or if sentencepiece is not installed."""
        self._pieces: Any = _processor(Path(path))

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self._pieces.vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, as it stands."""
        # A lone surrogate has no UTF-8, which sentencepiece would raise on; text may come from anybody.
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        return [int(token) for token in self._pieces.encode(clean)]

    def encode_role(self, role: str) -> list[int]:
        """The ids of a role text, wrapped as `<system> … <system>` unless it already is; [] for an empty role."""
        text = role.strip()
        if not text:
            return []
        wrapped = text.startswith(SYSTEM_TAG) and text.endswith(SYSTEM_TAG) and len(text) > len(SYSTEM_TAG)
        return self.encode(text if wrapped else f"{SYSTEM_TAG} {text} {SYSTEM_TAG}")

    def piece(self, token: int) -> str:
        """What a text token adds to the transcript: "" for padding, end of padding and sentence marks.

        A byte of a longer character is shown as U+FFFD: a token alone cannot tell which character it is part of.
        Raises ValueError for an id the tokenizer does not have.
        """
        if not 0 <= token < self.size:
            raise ValueError(f"text token {token} is not one of this tokenizer's 0 … {self.size - 1}")
        if token in (TEXT_PAD, TEXT_END_OF_PAD) or self._pieces.is_control(token):
            return ""
        piece = str(self._pieces.id_to_piece(token))
        if self._pieces.is_byte(token):
            value = int(piece[3:-1], 16)  # "<0x41>"
            if value >= 0x80:
                return _UNFINISHED_BYTE
            shown = chr(value)
            return shown if shown.isprintable() else " " if shown.isspace() else ""
        return piece.replace(_WORD_START, " ")


def _processor(path: Path) -> Any:
    try:
        import sentencepiece  # the GPU benchmarks run where it is not installed
    except ImportError as error:
        raise TokenizerError("text needs the package sentencepiece: pip install sentencepiece==0.2.3") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"the text tokenizer {path} cannot be read: {error.strerror}") from error
    pieces = sentencepiece.SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(content)
        size = int(pieces.vocab_size())
    except RuntimeError as error:
        raise TokenizerError(f"{path} is not a SentencePiece model: {error}") from error
    if size <= TEXT_PAD:
        raise TokenizerError(f"{path} has {size} pieces: fewer than the special ids 0 … {TEXT_PAD}")
    return pieces

"""The text tokenizer in a replica's own process: token → what it adds to the transcript. Loads no torch."""

from __future__ import annotations

from models.checkpoint_files import TOKENIZER_FILES, find_checkpoint
from models.tokenizer import TextTokenizer


class Vocabulary:
    """actors.interfaces.Pieces as a table; a token the tokenizer does not have shows nothing."""

    def __init__(self, pieces: tuple[str, ...]) -> None:
        self._pieces = pieces

    def piece(self, token_id: int) -> str:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""


def load_pieces(checkpoint: str) -> Vocabulary:
    """The vocabulary of a checkpoint; an empty one where it has no tokenizer (one made for parity).

    Raises models.checkpoint_files.CheckpointError.
    """
    files = find_checkpoint(checkpoint)
    if files.config.get("tokenizer", True) is None:
        return Vocabulary(())
    tokenizer = TextTokenizer(files.need(files.tokenizer, "text tokenizer", TOKENIZER_FILES))
    return Vocabulary(tuple(tokenizer.piece(token) for token in range(tokenizer.size)))

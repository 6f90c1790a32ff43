"""Trains the demo model's text tokenizer: `python -m training.demo_tokenizer [OUT.model]`.

The result is committed as models/assets/demo_tokenizer.model, so nobody trains it on first use; a test checks
that this recipe still gives the committed bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "data" / "tokenizer_corpus.txt"
COMMITTED = Path(__file__).parents[1] / "models" / "assets" / "demo_tokenizer.model"
VOCABULARY = 2_000


def train(corpus: Path = CORPUS) -> bytes:
    """The serialised SentencePiece model: BPE, 2,000 pieces, ids as in the published tokenizer.

    Id 0 is unknown text (PersonaPlex: end of padding), 1 and 2 are sentence marks nobody emits, 3 is padding.
    Bytes are the fallback, so that any role text has an encoding without an unknown piece.
    """
    import sentencepiece  # only whoever trains or reads text needs it

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.read_text(encoding="utf-8").splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",  # a normaliser's table would be nine tenths of the file
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,  # the order of merges must not depend on the machine
        minloglevel=1,
    )
    return out.getvalue()


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else COMMITTED
    model = train()
    target.write_bytes(model)
    print(f"{target}: {len(model):,} bytes")


if __name__ == "__main__":
    main()

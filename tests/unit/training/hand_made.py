"""Utterances made by hand."""

from __future__ import annotations

import numpy as np

from training.kokoro import RATE, Utterance, Word


def spoken(voice: str, text: str) -> Utterance:
    """A second for each word."""
    words = tuple(Word(word, float(i), i + 0.9) for i, word in enumerate(text.split()))
    return Utterance(np.full(len(words) * RATE, 1000, dtype=np.int16), words)

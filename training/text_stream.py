"""The agent's words as a stream of text tokens, one a frame: PAD, EPAD before a word, the word from its first frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from models.config import FRAMES_PER_S, TEXT_END_OF_PAD, TEXT_PAD
from training.kokoro import Word

_EARLY_S = 0.02  # a word that sounds from the last moment of a frame on is the next frame's


def frame_of(start_s: float) -> int:
    """The frame in which a word begins."""
    return int((start_s + _EARLY_S) * FRAMES_PER_S)


def text_stream(words: Sequence[Word], frames: int, encode: Callable[[str], Sequence[int]]) -> npt.NDArray[np.int16]:
    """[frames] int16.

    words in order of time; encode gives a word's ids. A word that is still being written when the next one begins
    pushes it back; tokens past the end are dropped. The PAD before a word becomes EPAD, which says "now".
    """
    stream = np.full(frames, TEXT_PAD, dtype=np.int16)
    free = 0  # the first frame not yet written to
    for word in words:
        ids = list(encode(word.text))
        start = max(frame_of(word.start_s), free)
        if start >= frames:
            break
        if start > 0 and stream[start - 1] == TEXT_PAD:
            stream[start - 1] = TEXT_END_OF_PAD
        stop = min(start + len(ids), frames)
        stream[start:stop] = ids[: stop - start]
        free = stop
    return stream

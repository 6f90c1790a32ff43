"""Text to Kokoro's phonemes through espeak-ng, and back from phonemes to words.

Kokoro was trained on espeak's IPA with punctuation kept. espeak joins some short words ("of the" → ʌvðə), so
which phoneme belongs to which word is found by aligning the sentence to its words spoken one by one.
"""

from __future__ import annotations

import functools
import re
import subprocess

_PUNCTUATION = re.compile(r"([;:,.!?¡¿—…\"()“”]+)")
# What the voices were trained with differs from espeak's alphabet in these.
_REPLACE = str.maketrans({"r": "ɹ", "x": "k", "ʲ": "j", "ɬ": "l", "\N{COMBINING VERTICAL LINE BELOW}": ""})
# espeak spells these out letter by letter. Each must stand as a clause of its own ("Mhm. Go on.").
_SOUNDS = {"mhm": "əmhˈʌm", "mm": "ˈʌm", "hmm": "hˈʌm", "uh huh": "ʌhˈʌ", "uhm": "ˈʌm", "um": "ˈʌm", "uh": "ˈʌ"}


@functools.lru_cache(maxsize=65_536)
def espeak(text: str, language: str) -> str:
    """IPA of `text` without punctuation, as espeak-ng says it. Raises RuntimeError if espeak-ng is not installed."""
    if text.lower() in _SOUNDS:
        return _SOUNDS[text.lower()]
    try:
        done = subprocess.run(
            ["espeak-ng", "-q", "--ipa", "-v", language, "--", text], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise RuntimeError("speech synthesis needs espeak-ng: apt-get install espeak-ng") from error
    return " ".join(done.stdout.split()).translate(_REPLACE)


def phonemize(text: str, language: str) -> tuple[str, list[int]]:
    """Phonemes of a sentence, and for each the index of its word in `text.split()` (-1: space or punctuation)."""
    words = text.split()
    phonemes, owners = "", []
    first = 0
    for piece in _PUNCTUATION.split(text):
        if not piece.strip():
            continue
        if _PUNCTUATION.fullmatch(piece):
            phonemes += piece
            owners += [-1] * len(piece)
            continue
        spoken = piece.split()
        if phonemes:
            phonemes += " "
            owners.append(-1)
        ipa = espeak(" ".join(spoken), language)
        phonemes += ipa
        owners += assign_words(ipa, [espeak(word, language) for word in spoken], first)
        first += len(spoken)
    if first != len(words):
        raise ValueError(f"punctuation must touch a word and hyphens are not spoken: {text!r}")
    return phonemes, owners


def assign_words(sentence: str, words: list[str], first: int = 0) -> list[int]:
    """For each character of `sentence` the number of the word it belongs to, counted from `first`; -1 for spaces.

    The words' own phonemes are aligned to the sentence's by least edit distance.
    """
    target = [(char, index) for index, word in enumerate(words) for char in word if char != " "]
    places = [i for i, char in enumerate(sentence) if char != " "]
    rows, columns = len(places), len(target)
    cost = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows + 1):
        for j in range(columns + 1):
            if i == 0 or j == 0:
                cost[i][j] = i + j
                continue
            same = sentence[places[i - 1]] == target[j - 1][0]
            cost[i][j] = min(cost[i - 1][j - 1] + (0 if same else 1), cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    owners = [-1] * len(sentence)
    i, j = rows, columns
    while i > 0:
        word = target[max(j - 1, 0)][1] if target else 0
        if j > 0:
            same = sentence[places[i - 1]] == target[j - 1][0]
            if cost[i][j] == cost[i - 1][j - 1] + (0 if same else 1):
                owners[places[i - 1]] = first + word
                i, j = i - 1, j - 1
                continue
            if cost[i][j] == cost[i][j - 1] + 1:
                j -= 1
                continue
        owners[places[i - 1]] = first + word
        i -= 1
    return owners

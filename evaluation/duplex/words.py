"""Words as they are compared: numbers spelled out, one spelling for each, edit distance. Pure.

Whisper writes "$4.50" where the agent's text says "four fifty"; both become the same words here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\$?\d[\d,]*(?:[.:]\d+)?%?|[a-z]+(?:'[a-z]+)*")
_NUMBER = re.compile(r"(\$?)(\d+)(?:([.:])(\d+))?(%?)")

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SMALL = frozenset([*_ONES, *_TENS])
_NUMERALS = _SMALL | {"hundred", "thousand", "million"}

_SAME = {
    "ok": "okay", "gonna": "going to", "wanna": "want to", "cannot": "can not", "can't": "can not",
    "won't": "will not", "anytime": "any time", "goodbye": "good bye", "alright": "all right",
    "dr": "doctor", "mr": "mister",
}  # fmt: skip
_ENDINGS = (("n't", " not"), ("'re", " are"), ("'m", " am"), ("'ll", " will"), ("'ve", " have"))

# What somebody says who goes on listening. Longer or other words, and it is a turn of their own ("yes" answers).
_MURMURS = frozenset((
    "ah", "aha", "hm", "hmm", "huh", "mhm", "mm", "mmm", "oh", "okay", "ooh", "really", "right", "sure",
    "uh", "uhm", "um", "wow", "yeah", "yep",
))  # fmt: skip
_MURMURED = frozenset(("all right", "go on", "got it", "i see", "oh i see", "no way"))


def spoken(text: str) -> list[str]:
    """A text's words: lower case, no punctuation, numbers and common contractions spelled out.

    Numbers that can be said in several ways have one form: "half past six" and "6:30" are "six thirty", "a hundred" is
    "one hundred", "a hundred and twenty" is "one twenty" as "890" is "eight ninety".
    """
    words: list[str] = []
    # "uh-huh" is two words, "25-minute" as well; typographic apostrophes are apostrophes.
    for token in _TOKEN.findall(text.lower().replace("’", "'").replace("-", " ")):
        words += _number(token) if token[0] in "$0123456789" else _word(token)
    return _one_form(words)


def errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """The least number of words to change, leave out and add that make `said` into `heard` (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(before + (word != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def contains(heard: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` stands in `heard`, word after word; "dollars" and where words are parted do not matter.

    Per word of five letters or more one letter may differ, for a name has many spellings ("Clara", "Klara"). Numbers
    are exact, and not part of a longer one: "twenty six" is not "six".
    """
    left, right = ([word for word in words if word not in ("dollar", "dollars")] for words in (heard, wanted))
    text = "".join(right)
    exact = any(word in _NUMERALS for word in right)
    letters = 0 if exact else sum(len(word) >= 5 for word in right)
    counts = range(max(1, len(right) - 1), len(right) + 2)
    places = [(start, start + count) for count in counts for start in range(len(left) - count + 1)]
    return bool(right) and any(
        errors("".join(left[start:stop]), text) <= letters and not _cuts_number(left, start, stop)
        for start, stop in places
    )


def _cuts_number(words: Sequence[str], start: int, stop: int) -> bool:
    """Whether a number goes on beyond one end of `words[start:stop]`."""
    pairs = (words[max(0, edge - 1) : edge + 1] for edge in (start, stop))
    return any(len(pair) == 2 and all(word in _NUMERALS for word in pair) for pair in pairs)


def is_murmur(words: Sequence[str]) -> bool:
    """Whether these words are what a listener murmurs. No words at all are: "mm-hm" is often written as nothing."""
    return all(word in _MURMURS for word in words) or " ".join(words) in _MURMURED


def _word(token: str) -> list[str]:
    if token in _SAME:
        return _SAME[token].split()
    for ending, full in _ENDINGS:
        if token.endswith(ending) and len(token) > len(ending):
            return (token.removesuffix(ending) + full).split()
    return [token]


def _number(token: str) -> list[str]:
    match = _NUMBER.fullmatch(token.replace(",", ""))
    if match is None:  # a date or a version: nothing that our agents say
        return [token]
    dollars, whole, mark, rest, percent = match.groups()
    words = cardinal(int(whole)) if mark or dollars else _year_or_cardinal(whole)
    if mark == ":" or (mark and (dollars or len(rest) == 2)):
        # 6:30, $4.50 and 4.50 are read in two numbers, and .00 is not read.
        minutes = int(rest)
        words += (["oh"] if mark == ":" and 0 < minutes < 10 else []) + (cardinal(minutes) if minutes else [])
        words += ["dollars"] if dollars and not minutes else []
    elif mark:
        words += ["point", *(_ONES[int(digit)] for digit in rest)]
    elif dollars:
        words += ["dollars" if int(whole) != 1 else "dollar"]
    return words + (["percent"] if percent else [])


def cardinal(number: int) -> list[str]:
    """A whole number's words, without "and". Raises ValueError if it is negative."""
    if number < 0:
        raise ValueError(f"{number} is not counted up to")
    for size, name in ((1_000_000, "million"), (1_000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = number % size
            return [*cardinal(number // size), name, *(cardinal(rest) if rest else [])]
    if number < 20:
        return [_ONES[number]]
    return [_TENS[number // 10], *([_ONES[number % 10]] if number % 10 else [])]


def _year_or_cardinal(digits: str) -> list[str]:
    number = int(digits)
    if len(digits) == 4 and 1100 <= number < 2100 and not 2000 <= number < 2010 and number % 100:
        rest = number % 100
        return [*cardinal(number // 100), *(["oh"] if rest < 10 else []), *cardinal(rest)]
    return cardinal(number)


def _one_form(words: Sequence[str]) -> list[str]:
    out: list[str] = []
    for place, word in enumerate(words):
        before, following, beyond = (
            words[at] if 0 <= at < len(words) else "" for at in (place - 1, place + 1, place + 2)
        )
        dropped = (word == "and" and before in ("hundred", "thousand") and following in _NUMERALS) or (
            word == "hundred"
            and before in (*_NUMERALS, "a")
            and (beyond if following == "and" else following) in _SMALL
        )
        if dropped:
            continue
        if word == "a" and following in ("hundred", "thousand", "million"):
            out.append("one")
        elif out[-2:] == ["half", "past"]:
            out[-2:] = [word, "thirty"]
        else:
            out.append(word)
    return out

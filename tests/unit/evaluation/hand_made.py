"""Dialogues made by hand, of one user and of agents whose right scores anybody can count.

The user asks with a pause (1 to 2 s, pause, 3 to 4 s), asks for a price (8 to 9.5 s) and breaks into the answer at 12 s
("wait", to 12.8 s); then asks a last thing (13.4 to 15 s). So there are three turns to be taken, one pause, one
interruption, one fact and one voice.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.duplex.dialogue import Dialogue, Span, Unspoken, UserTurn, Word
from evaluation.duplex.score import Event, Measure, Score

SECONDS = 20.0
ASKS = UserTurn("turn", (Span(1.0, 2.0), Span(3.0, 4.0)), "I was wondering … when do you open", answer=True)
PRICE = UserTurn("turn", (Span(8.0, 9.5),), "how much is a latte", answer=True, asks=True, expected=("four fifty",))
WAIT = UserTurn("interruption", (Span(12.0, 12.8),), "wait")
LAST = UserTurn("turn", (Span(13.4, 15.0),), "do you sell tea", answer=True)
USER = (ASKS, PRICE, WAIT, LAST)
NEAR = {"NATF0": 0.95, "NATM0": 0.60}


def said(*texts_at: tuple[float, str]) -> tuple[Word, ...]:
    """Words of 0.3 s each, one after the other from each beginning."""
    return tuple(
        Word(word, start_s + 0.3 * number, start_s + 0.3 * number + 0.3)
        for start_s, text in texts_at
        for number, word in enumerate(text.split())
    )


def dialogue(
    speech: Sequence[tuple[float, float]],
    words: Sequence[Word] = (),
    *,
    turns: Sequence[UserTurn] = USER,
    unspoken: Sequence[Unspoken] = (),
    text: str | None = None,
    similarities: dict[str, float] | None = None,
    no_voice: str = "",
) -> Dialogue:
    """An agent's text stream is what it says, unless told otherwise."""
    return Dialogue(
        turns=tuple(turns),
        speech=tuple(Span(*span) for span in speech),
        words=tuple(words),
        text=" ".join(word.text for word in words) if text is None else text,
        unspoken=tuple(unspoken),
        seconds=SECONDS,
        voice="NATF0",
        similarities=NEAR if similarities is None else similarities,
        no_voice=no_voice,
    )


PERFECT_WORDS = said((4.3, "we open at nine thirty"), (9.8, "it is four fifty and very good"), (15.4, "no we do not"))


def perfect() -> Dialogue:
    """Begins 300 ms after each end, stops 300 ms after the interruption, murmurs in the pause."""
    murmur = said((2.3, "uh huh"))
    words = sorted((*murmur, *PERFECT_WORDS), key=lambda word: word.start_s)
    return dialogue([(2.3, 2.9), (4.3, 5.8), (9.8, 12.3), (15.4, 16.6)], words)


def interrupter() -> Dialogue:
    """Begins in the middle of everything the user says, and is done before the user is."""
    return dialogue(
        [(1.5, 3.2), (8.5, 9.4), (11.5, 12.4), (13.8, 14.9)], said((1.5, "well let me tell"), (8.5, "yes it is"))
    )


def filibuster() -> Dialogue:
    """Speaks from the first second to the last."""
    return dialogue([(0.5, SECONDS)], said((0.5, "and so on and so on"), (10.0, "four fifty and so on")))


def silence() -> Dialogue:
    """Never says a word; so nobody could interrupt it either."""
    never = Unspoken("interruption", "wait", "agent silent", 13.5)
    return dialogue([], turns=(ASKS, PRICE, LAST), unspoken=[never], similarities={})


def events(score: Score, measure: Measure) -> list[Event]:
    return [event for event in score.events if event.measure == measure]

"""From a dialogue to its scores: pure, no audio, no judge. What each measure means stands in README.md, in words.

Every occasion to do something right gives an `Event`: met, missed, or void where nothing could be measured, with the
reason. Nothing is dropped: an occasion that never came about is an event as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evaluation.duplex.dialogue import Dialogue, Span, UserTurn, Word
from evaluation.duplex.words import contains, errors, is_murmur, spoken

Measure = Literal["turns", "yields", "pauses", "facts", "voice"]
Outcome = Literal["met", "missed", "void"]
FactJudge = Callable[[UserTurn, Sequence[str]], bool]  # question, words of the answer → is it right?

TAKES_WITHIN_S = 1.0
YIELDS_WITHIN_S = 0.6
MERGE_S = 0.3  # a shorter gap is a breath or a stop consonant, not silence
SHORT_S, SHORT_WORDS = 1.0, 3  # shorter, and no more words than that: no turn while the other has the floor
# People begin a little before the other has ended (Stivers et al. 2009: answers start from half a second before on).
EARLY_S = 0.5
REACTION_S = 0.2  # who begins this soon after a pause decided to within it
LEAST_VOICE_S = 2.0  # Resemblyzer looks at 1.6 s at a time; with less there is no voice to compare

_EDGE_S = 0.1  # a word counts to the stretch it lies in, give or take so much of the aligner's error


@dataclass(frozen=True)
class Event:
    """One occasion. delay_s: how long the agent took to begin, or to stop."""

    measure: Measure
    at_s: float
    outcome: Outcome
    why: str
    delay_s: float | None = None


@dataclass(frozen=True)
class Score:
    """What one dialogue gives; gates are on sums over all of them."""

    events: tuple[Event, ...]
    word_errors: int
    words_said: int  # in the agent's own text

    def outcomes(self, measure: Measure) -> list[Outcome]:
        return [event.outcome for event in self.events if event.measure == measure]

    @property
    def missed(self) -> int:
        return sum(event.outcome == "missed" for event in self.events)


@dataclass(frozen=True)
class Stretch:
    """The agent speaks, without a gap of MERGE_S."""

    start_s: float
    end_s: float
    short: bool  # listening along, whatever the words: Whisper spells "uh huh" in many ways
    murmur: bool  # short, and the words say no more than that somebody listens; "yes" may be a whole answer


def contains_every(question: UserTurn, answer: Sequence[str]) -> bool:
    """The rule that needs no model: every expected text is said. A language model can stand in its place."""
    return all(contains(answer, spoken(text)) for text in question.expected)


def score(dialogue: Dialogue, is_right: FactJudge = contains_every) -> Score:
    """All measures of one dialogue."""
    speech = stretches(dialogue.speech, dialogue.words)
    events: list[Event] = []
    for number, turn in enumerate(dialogue.turns):
        if turn.answer:
            events.append(_takes(turn, speech))
        if turn.kind == "interruption":
            events.append(_yields(turn, speech))
        events += [_waits(pause, speech) for pause in turn.pauses if turn.kind == "turn"]
        if turn.asks:
            events.append(_answers(turn, dialogue.turns[number + 1 :], dialogue.words, is_right))
    events = [_unless_stalled(event, dialogue.stalls) for event in events]
    events += [_unspoken(entry.why, entry.at_s) for entry in dialogue.unspoken if entry.kind == "interruption"]
    events.append(_sounds(dialogue))
    said = spoken(dialogue.text)
    wrong = errors(said, [word.text for word in dialogue.words])
    return Score(tuple(sorted(events, key=lambda event: event.at_s)), wrong, len(said))


def stretches(speech: Sequence[Span], words: Sequence[Word]) -> list[Stretch]:
    """The agent's speech in stretches, what is short and what is a murmur told from turns."""
    merged: list[Span] = []
    for span in sorted(speech):
        if merged and span.start_s - merged[-1].end_s < MERGE_S:
            merged[-1] = Span(merged[-1].start_s, max(merged[-1].end_s, span.end_s))
        else:
            merged.append(span)
    return [_stretch(span, words) for span in merged]


def _stretch(span: Span, words: Sequence[Word]) -> Stretch:
    inside = [
        word.text for word in words if span.start_s - _EDGE_S <= (word.start_s + word.end_s) / 2 <= span.end_s + _EDGE_S
    ]
    short = span.seconds < SHORT_S and len(inside) <= SHORT_WORDS
    return Stretch(span.start_s, span.end_s, short, short and is_murmur(inside))


def _takes(turn: UserTurn, speech: Sequence[Stretch]) -> Event:
    """The agent's first turn from EARLY_S before the user's end to TAKES_WITHIN_S after it, which outlasts it."""
    end_s = turn.end_s
    for stretch in speech:
        delay_s = round(stretch.start_s - end_s, 3)
        if -EARLY_S <= delay_s <= TAKES_WITHIN_S and stretch.end_s > end_s and not stretch.murmur:
            where = "after" if delay_s >= 0 else "before"
            return Event("turns", end_s, "met", f"began {abs(delay_s) * 1e3:.0f} ms {where} the user's end", delay_s)
    late = next((s for s in speech if s.start_s > end_s + TAKES_WITHIN_S and not s.murmur), None)
    if any(s.start_s < end_s - EARLY_S and s.end_s > end_s and not s.murmur for s in speech):
        why = "was speaking already, all through the user's end"
    elif late is not None:
        why = f"began only {late.start_s - end_s:.2f} s after the user's end"
    else:
        why = "was not heard to speak after it"
    return Event("turns", end_s, "missed", why, round(late.start_s - end_s, 3) if late else None)


def _yields(turn: UserTurn, speech: Sequence[Stretch]) -> Event:
    """The stretch that the user broke into ends in time, and no other begins while the user speaks."""
    begin_s = turn.start_s
    broken = next((s for s in speech if s.start_s <= begin_s < s.end_s), None)
    if broken is None:
        return Event("yields", begin_s, "void", "was not speaking just then: there was nothing to interrupt")
    delay_s = round(broken.end_s - begin_s, 3)
    if delay_s > YIELDS_WITHIN_S:
        return Event("yields", begin_s, "missed", f"went on for {delay_s:.2f} s", delay_s)
    if any(begin_s < s.start_s < turn.end_s - EARLY_S and not s.short for s in speech):
        return Event("yields", begin_s, "missed", f"fell silent after {delay_s * 1e3:.0f} ms, then spoke on", delay_s)
    return Event("yields", begin_s, "met", f"fell silent after {delay_s * 1e3:.0f} ms", delay_s)


def _unless_stalled(event: Event, stalls: Sequence[Span]) -> Event:
    """What the line did is not the agent's doing."""
    around = Span(event.at_s - EARLY_S, event.at_s + TAKES_WITHIN_S)
    if event.measure == "facts" or not any(s.start_s < around.end_s and s.end_s > around.start_s for s in stalls):
        return event
    return replace(event, outcome="void", why="the line stalled just then", delay_s=None)


def _unspoken(why: str, at_s: float) -> Event:
    if why == "agent finished":
        return Event("yields", at_s, "void", "had finished before it could be interrupted")
    # Silence must not pass for good manners.
    return Event("yields", at_s, "missed", "never spoke, so that nobody could interrupt it")


def _waits(pause: Span, speech: Sequence[Stretch]) -> Event:
    for stretch in speech:
        if not stretch.short and stretch.start_s < pause.end_s + REACTION_S and stretch.end_s > pause.start_s:
            early = stretch.start_s < pause.start_s
            why = "was speaking when the pause began" if early else "spoke in the user's pause"
            return Event("pauses", pause.start_s, "missed", why)
    return Event("pauses", pause.start_s, "met", f"waited through {pause.seconds:.1f} s")


def _answers(turn: UserTurn, later: Sequence[UserTurn], words: Sequence[Word], is_right: FactJudge) -> Event:
    """Judged on what was heard from EARLY_S before the question's end to the user's next turn."""
    if turn.unjudged or not turn.expected:
        return Event("facts", turn.end_s, "void", turn.unjudged or "no wording can be expected")
    until_s = next((other.start_s for other in later if other.kind != "backchannel"), float("inf"))
    answer = [word.text for word in words if turn.end_s - EARLY_S <= word.start_s < until_s]
    heard = f"expected {', '.join(map(repr, turn.expected))}, heard {' '.join(answer)!r}"
    return Event("facts", turn.end_s, "met" if is_right(turn, answer) else "missed", heard)


def _sounds(dialogue: Dialogue) -> Event:
    if dialogue.no_voice:
        return Event("voice", 0.0, "void", dialogue.no_voice)
    spoken_s = sum(span.seconds for span in dialogue.speech)
    if spoken_s < LEAST_VOICE_S or dialogue.voice not in dialogue.similarities:
        return Event("voice", 0.0, "missed", f"spoke {spoken_s:.1f} s, too little to know a voice by")
    own = dialogue.similarities[dialogue.voice]
    others = {voice: value for voice, value in dialogue.similarities.items() if voice != dialogue.voice}
    nearest = max(others, key=lambda voice: others[voice], default=None)
    if nearest is None:
        return Event("voice", 0.0, "void", "there is one reference only, nothing to compare with")
    why = f"{own:.3f} to {dialogue.voice}, {others[nearest]:.3f} to {nearest}, the nearest other"
    return Event("voice", 0.0, "met" if own > others[nearest] else "missed", why)

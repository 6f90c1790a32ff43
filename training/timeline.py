"""From a script and the spoken utterances to who speaks when: every utterance placed, interruptions cut. Pure.

Channels are what the model has: agent and user. What somebody beside the user says lands in the user's channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from training.kokoro import RATE, Utterance, Word
from training.script import Kind, Script, Speaker, Turn

FADE_S = 0.02  # of a cut word's end: a hard edge would click
_BREATH_S = 0.06  # a word may take to end after the voice yields
_REACTION_S = 0.1  # an utterance that is to be cut is heard at least this long before
TAIL_S = 2.5  # after the last word nobody speaks; the model has to learn that, too

Lookup = Callable[[str, str], Utterance]  # (voice, text) → what the bank holds


@dataclass(frozen=True)
class Placed:
    """An utterance on the timeline. `samples` of it are heard; the rest was cut off by an interruption."""

    speaker: Speaker
    kind: Kind
    start: int  # sample
    samples: int
    voice: str
    text: str
    words: tuple[Word, ...]  # seconds from the dialogue's start, only those that are heard
    cut: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.samples


@dataclass(frozen=True)
class Timeline:
    placed: tuple[Placed, ...]
    samples: int

    @property
    def seconds(self) -> float:
        return self.samples / RATE


def lay_out(script: Script, lookup: Lookup) -> Timeline:
    """Places every turn of a script. Raises whatever `lookup` raises for an utterance that was never spoken."""
    voices = {"agent": script.agent_voice, "user": script.user_voice, "aside": script.aside_voice}
    placed: list[Placed] = []
    floor = 0  # where the last turn ended: gaps count from here
    last: list[Placed] = []  # the parts of that turn
    for turn in script.turns:
        utterances = [lookup(voices[turn.speaker], part) for part in turn.parts]
        if turn.kind == "backchannel":
            if last:
                placed.append(_place(turn, voices[turn.speaker], 0, utterances[0], _murmur_start(last, turn.at)))
            continue
        if turn.kind == "interruption" and last:
            start = _moment(last, turn.at)
            # Their turn and what was murmured into it stay; of what they were still to say, nothing does.
            whole, last = last, _cut(last, start, round(turn.yield_s * RATE))
            placed = [item for item in placed if item not in whole and item.start < start] + last
        else:
            start = max(0, floor + round(turn.gap_s * RATE))
        parts: list[Placed] = []
        for number, utterance in enumerate(utterances):
            parts.append(_place(turn, voices[turn.speaker], number, utterance, start))
            pause = turn.pauses_s[number] if number < len(turn.pauses_s) else 0.0
            start = parts[-1].stop + round(pause * RATE)
        placed += parts
        # After an interruption the other's last word may still sound.
        floor, last = max(parts[-1].stop, *(item.stop for item in placed)), parts
    samples = max((item.stop for item in placed), default=0) + round(TAIL_S * RATE)
    return Timeline(tuple(_in_order(placed)), samples)


def _place(turn: Turn, voice: str, number: int, utterance: Utterance, start: int) -> Placed:
    offset = start / RATE
    words = tuple(Word(w.text, round(w.start_s + offset, 3), round(w.end_s + offset, 3)) for w in utterance.words)
    return Placed(turn.speaker, turn.kind, start, len(utterance.pcm), voice, turn.parts[number], words)


def _moment(parts: Sequence[Placed], fraction: float) -> int:
    """The sample at that fraction of a turn, pauses included."""
    first, last = parts[0].start, parts[-1].stop
    return first + max(round(_REACTION_S * RATE), round(fraction * (last - first)))


def _murmur_start(parts: Sequence[Placed], fraction: float) -> int:
    """A backchannel comes in the pause nearest to where the script wants it, else right there."""
    wanted = _moment(parts, fraction)
    pauses = [(before.stop, after.start) for before, after in itertools.pairwise(parts)]
    if not pauses:
        return wanted
    begin, end = min(pauses, key=lambda pause: abs(pause[0] - wanted))
    return min(begin + round(0.15 * RATE), end)


def _cut(parts: Sequence[Placed], interrupted: int, yield_samples: int) -> list[Placed]:
    """What is left of a turn that yields: the word that sounds `yield_samples` after the interruption is its last."""
    limit = interrupted + yield_samples
    kept: list[Placed] = []
    for part in parts:
        if part.start >= limit:
            break
        if part.stop <= limit:
            kept.append(part)
            continue
        words = tuple(word for word in part.words if word.start_s * RATE < limit)
        # Within a long word the voice stops anyway: nobody finishes "understand" for an interrupter.
        stop = min(round(words[-1].end_s * RATE), limit + round(_BREATH_S * RATE)) if words else limit
        if words:
            words = (*words[:-1], replace(words[-1], end_s=round(min(words[-1].end_s, stop / RATE), 3)))
        kept.append(replace(part, samples=max(1, min(stop, part.stop) - part.start), words=words, cut=True))
        break
    return kept or [replace(parts[0], samples=1, words=(), cut=True)]


def _in_order(placed: Sequence[Placed]) -> list[Placed]:
    return sorted(placed, key=lambda item: item.start)


def agent_words(timeline: Timeline) -> list[Word]:
    """What the agent says, in order of time: the text stream."""
    spoken = [word for item in timeline.placed if item.speaker == "agent" for word in item.words]
    return sorted(spoken, key=lambda word: word.start_s)

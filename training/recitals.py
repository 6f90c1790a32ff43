"""Lessons in looking up: an agent's answers as text alone, behind a prompt that has their values. Pure and seeded.

A dialogue asks for few values, each of a dozen that could be, and a model that knows those gains little by looking into
its prompt. Here every sentence has one, any words of a list: whoever does not look them up is wrong. Nobody is heard
and nothing is said. Words alone count: when to begin one follows from nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from models.config import FRAMES_PER_S, NO_INPUT, STREAMS, TEXT_END_OF_PAD, TEXT_PAD
from training.kokoro import Word
from training.readings import any_of, any_word
from training.roles import (
    Names,
    Role,
    choose,
    fill,
    instantiate,
    load_common,
    load_role,
    renamed,
    role_names,
    told_slots,
)
from training.script import AGENT_VOICES, LIVE_S, Plan, Script, Turn, length_s
from training.text_stream import text_stream

ROLE = "reciter"
_WORD_S = (0.16, 0.4)  # from one word's begin to the next one's
_SENTENCE_S = (0.3, 1.5)  # from one sentence's last word to the next one


def write_recital(plan: Plan, index: int) -> Script:
    """Recital number `index`: a role's answers in any order, each again and again in other words."""
    rng = np.random.default_rng([plan.seed, index, 11])
    role = load_role(any_of(_roles(), rng))
    instance = instantiate(role, "train", rng, _names(role, rng))
    told = [filled for filled in instance.exchanges if filled.exchange.fact]
    turns: list[Turn] = []
    while length_s(turns) < LIVE_S:
        filled = any_of(told, rng)
        answer = fill(any_of(filled.exchange.answer, rng), renamed(filled.values, instance.names))
        turns.append(Turn("agent", (answer,), gap_s=round(float(rng.uniform(*_SENTENCE_S)), 2)))
    voice = AGENT_VOICES[int(rng.integers(plan.agent_voices))]  # it is not heard
    enrolment = choose(load_common().enrolment, "train", rng)
    return Script(index, "train", ROLE, instance.prompt, voice, "", "", enrolment, tuple(turns), ())


def recited(
    script: Script, encode: Callable[[str], Sequence[int]], rng: np.random.Generator
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """A recital as `training.splice` gives a dialogue: [frames, 17] int16, and where it is learnt from, [frames]."""
    words, now = list[Word](), 0.0
    for turn in script.turns:
        now += turn.gap_s
        for word in turn.parts[0].split():
            words.append(Word(word, now, now))
            now += float(rng.uniform(*_WORD_S))
    frames = np.full((int((now + 1.0) * FRAMES_PER_S), STREAMS), NO_INPUT, dtype=np.int16)
    frames[:, 0] = text_stream(words, len(frames), encode)
    return frames, ~np.isin(frames[:, 0], (TEXT_PAD, TEXT_END_OF_PAD))


@functools.cache
def _roles() -> tuple[str, ...]:
    """Those with facts."""
    return tuple(name for name in role_names() if any(each.fact for each in load_role(name).exchanges))


def _names(role: Role, rng: np.random.Generator) -> Names:
    """Any words, as many as there were, for whatever a prompt tells."""
    return {
        slot: {option: " ".join(any_word(rng) for _ in option.split()) for option in role.slots[slot]}
        for slot in sorted(told_slots(role))
    }

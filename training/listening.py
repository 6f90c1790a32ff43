"""Lessons in listening: somebody talks, and the model writes down every word a moment later. Pure and seeded.

Of a question, a dialogue asks for no more than the first word of its answer, and a model finds its way through those
it has heard without learning words. Here each one counts. The agent has no voice in these lessons: nothing of it is
shown, and nothing learnt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.roles import choose, load_common
from training.script import AGENT_VOICES, LIVE_S, Plan, Script, Speakable, Turn, length_s

ROLE = "listener"
PROMPT = "You write down what you hear."
LATE_S = 0.24  # a word is written so long after its end
_TRIES = 200  # at finding more that the same voice has said


def write_listening(
    plan: Plan, index: int, source: Callable[[np.random.Generator], tuple[Script, bool]], speakable: Speakable
) -> Script:
    """Lesson number `index`: one voice, and whatever it says in several scripts.

    source: any script, and whether its agent is to be listened to, else its user. speakable: what the bank has.
    """
    rng = np.random.default_rng([plan.seed, index, 10])
    voice, turns, said = "", list[Turn](), set[str]()
    for _ in range(_TRIES):
        script, agent = source(rng)
        speaker = script.agent_voice if agent else script.user_voice
        voice = voice or speaker
        if speaker != voice:
            continue
        for turn in script.turns:
            new = [part for part in turn.parts if part not in said and speakable(voice, part)]
            if turn.speaker == ("agent" if agent else "user") and new:
                said |= set(new)
                turns += [Turn("user", (part,), gap_s=round(float(rng.uniform(0.2, 1.2)), 2)) for part in new]
        if length_s(turns) > LIVE_S:
            break
    agent_voice = AGENT_VOICES[int(rng.integers(plan.agent_voices))]  # it is not heard
    enrolment = choose(load_common().enrolment, "train", rng)
    return Script(index, "train", ROLE, PROMPT, agent_voice, voice, "", enrolment, tuple(turns), ())

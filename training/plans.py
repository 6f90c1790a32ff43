"""The data sets there are: which dialogues each number of a plan stands for."""

from __future__ import annotations

import numpy as np

from training.amounts import SPOKEN
from training.listening import write_listening
from training.readings import write_reading
from training.recitals import write_recital
from training.roles import Split, role_names
from training.script import AGENT_VOICES, USER_VOICES, Plan, Script, Speakable, write_script

PLANS = {
    "first": Plan(user_voices=10),
    # Of the same words, a counter of its own for each dialogue: its facts stand in its prompt and nowhere else.
    "again": Plan(
        seed=10, roles=("cafe", "teacher", "friend", "cafe"), user_voices=10, per_instance=1, spoken=True, renamed=True
    ),
    "roles": Plan(seed=7, roles=role_names(), user_voices=len(USER_VOICES)),  # all roles, still in four voices
    "wide": Plan(seed=6, roles=role_names(), agent_voices=len(AGENT_VOICES), user_voices=len(USER_VOICES)),
    "readings": Plan(seed=8, readings=True),  # of the roles of `first`
    # A counter's lines are few words in ever new company: heard two hundred times a voice they are garbled.
    "counter": Plan(seed=9, roles=("cafe",), readings=True, names=0.15),
    "listening": Plan(seed=11, listening=True, spoken=True),  # to whoever speaks in `first` and the readings
    "recitals": Plan(seed=12, recitals=True, spoken=True),  # of all roles that have facts; nobody says them
}
HELD_OUT_DIALOGUES = 48
_HEARD = {"first": 0.75, "counter": 0.15, "readings": 0.1}  # shares of what lessons in listening look for words in
_HEARD_AGENTS = 0.3  # of the dialogues among them are listened to for their agents


def script_of(plan: Plan, split: Split, index: int, speakable: Speakable | None = None) -> Script:
    """Dialogue number `index` of a plan. Raises ValueError where a plan has no such side."""
    if plan.spoken and speakable is None:
        raise ValueError("this plan says what the bank has for other plans: speak those, and splice this one")
    if split != "train" and not held_out_of(plan):
        raise ValueError("this plan is for training alone")
    if plan.listening and speakable is not None:
        return write_listening(plan, index, _heard, speakable)
    if plan.recitals:
        return write_recital(plan, index)
    return write_reading(plan, index) if plan.readings else write_script(plan, split, index, speakable)


def _heard(rng: np.random.Generator) -> tuple[Script, bool]:
    """Any script that is spoken, and whether to listen to its agent."""
    name = str(rng.choice(list(_HEARD), p=list(_HEARD.values())))
    script = script_of(PLANS[name], "train", int(rng.integers(SPOKEN[name])))
    return script, PLANS[name].readings or rng.random() < _HEARD_AGENTS


def held_out_of(plan: Plan) -> int:
    """How many dialogues a plan holds out."""
    return 0 if plan.readings or plan.spoken else HELD_OUT_DIALOGUES


def to_speak() -> list[str]:
    """The plans that say anything new."""
    return sorted(name for name, plan in PLANS.items() if not plan.spoken)


def to_judge() -> list[str]:
    """The plans that hold anything out."""
    return sorted(name for name, plan in PLANS.items() if held_out_of(plan))

"""The data sets there are: which dialogues each number of a plan stands for."""

from __future__ import annotations

from training.readings import write_reading
from training.roles import Split, role_names
from training.script import AGENT_VOICES, USER_VOICES, Plan, Script, write_script

PLANS = {
    "first": Plan(user_voices=10),
    "roles": Plan(seed=7, roles=role_names(), user_voices=len(USER_VOICES)),  # all roles, still in four voices
    "wide": Plan(seed=6, roles=role_names(), agent_voices=len(AGENT_VOICES), user_voices=len(USER_VOICES)),
    "readings": Plan(seed=8, readings=True),  # of the roles of `first`
    # A counter's lines are few words in ever new company: heard two hundred times a voice they are garbled.
    "counter": Plan(seed=9, roles=("cafe",), readings=True, names=0.15),
}
HELD_OUT_DIALOGUES = 48


def script_of(plan: Plan, split: Split, index: int) -> Script:
    """Dialogue number `index` of a plan. Raises ValueError where a plan has no such side."""
    if not plan.readings:
        return write_script(plan, split, index)
    if split != "train":
        raise ValueError("readings are for training alone")
    return write_reading(plan, index)


def held_out_of(plan: Plan) -> int:
    """How many dialogues a plan holds out."""
    return 0 if plan.readings else HELD_OUT_DIALOGUES

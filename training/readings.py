"""Dialogues in which nobody but the agent speaks: it reads sentences aloud. Pure and seeded, as `training.script`.

From them a voice learns to say words in all sorts of company, where dialogues teach when to say what. Three sentences
of four are of the roles: lines, an agent's or a user's, filled anew, and for `Plan.names` of them a name that dialogues
hold out, in a sentence of no role: who is to call a shop by its name must have said its words before. The others are
made of word lists and mean little. Their words are not learnt as text: nobody could tell which comes next.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

import numpy as np

from training.roles import DATA, allowed, choose, fill, lines_of, load_common, load_role, slots_of
from training.script import AGENT_VOICES, Plan, Script, Turn

_T = TypeVar("_T")

ROLE = "reader"
SENTENCES = 9
_OWN_LINES, _OF_ONE_ROLE = 0.75, 0.9
_LONGEST_WORD = 8  # letters: longer ones are rarely said
_WORD_LISTS = {"noun": "nounlist.txt", "adjective": "adjectivelist.txt", "verb": "verblist.txt"}
_PLAIN = re.compile(r"[a-z]+")


def write_reading(plan: Plan, index: int) -> Script:
    """Reading number `index` of a plan, by one of its agents' voices."""
    rng = np.random.default_rng([plan.seed, index, 7])
    raw, common = _raw(), load_common()
    prompt = fill(choose(raw["prompt"], "train", rng), {"agent": choose(common.slots["agent"], "train", rng)})
    voice = AGENT_VOICES[index % plan.agent_voices]
    turns = [
        Turn("agent", (_sentence(plan, rng),), gap_s=round(float(rng.uniform(0.3, 1.2)), 2)) for _ in range(SENTENCES)
    ]
    enrolment = choose(common.enrolment, "train", rng)
    return Script(index, "train", ROLE, prompt, voice, "", "", enrolment, tuple(turns), ())


def _sentence(plan: Plan, rng: np.random.Generator) -> str:
    if rng.random() < _OWN_LINES:
        if rng.random() < plan.names and _lacking(plan.roles):
            return fill(any_of(_raw()["names"], rng), {"name": any_of(_lacking(plan.roles), rng)})
        role = load_role(any_of(plan.roles, rng))
        line = any_of(_lines_of(role.name) if rng.random() < _OF_ONE_ROLE else _shared_lines(), rng)
        values = {slot: choose(role.slots[slot], "train", rng) for slot in slots_of(line)}
        return fill(line, values).replace("| ", "")
    line = choose(_raw()["lines"], "train", rng)
    # A slot that comes twice is filled twice.
    while slots := slots_of(line):
        line = line.replace(f"{{{slots[0]}}}", any_of(_options(slots[0]), rng), 1)
    return fill(line, {})


def any_of(options: Sequence[_T], rng: np.random.Generator) -> _T:
    """One of them."""
    return options[int(rng.integers(len(options)))]


def any_word(rng: np.random.Generator) -> str:
    """A word of a list."""
    return any_of(_options(any_of(tuple(_WORD_LISTS), rng)), rng)


@functools.cache
def _lacking(names: tuple[str, ...]) -> tuple[str, ...]:
    """Whatever somebody in these roles may have to say and no training dialogue says."""
    found = dict[str, None]()
    for name in names:
        slots = load_role(name).slots
        for slot in sorted({slot for line in _lines_of(name) for slot in slots_of(line)}):
            found |= dict.fromkeys(option for option in slots[slot] if option not in allowed(slots[slot], "train"))
    return tuple(found)


@functools.cache
def _lines_of(name: str) -> tuple[str, ...]:
    """What anybody says in a role, and its facts."""
    role = load_role(name)
    return allowed([line for line in lines_of(role) if line != role.prompt], "train")


@functools.cache
def _shared_lines() -> tuple[str, ...]:
    common = load_common()
    return allowed(
        [line for table in (common.user, common.agent) for lines in table.values() for line in lines], "train"
    )


@functools.cache
def _options(slot: str) -> tuple[str, ...]:
    if slot not in _WORD_LISTS:
        return allowed(load_common().slots[slot], "train")
    text = resources.files("wonderwords.assets").joinpath(_WORD_LISTS[slot]).read_text(encoding="utf-8")
    return tuple(word for word in text.split() if len(word) <= _LONGEST_WORD and _PLAIN.fullmatch(word))


@functools.cache
def _raw() -> dict[str, tuple[str, ...]]:
    raw = tomllib.loads((DATA / "readings.toml").read_text(encoding="utf-8"))
    return {name: tuple(lines) for name, lines in raw.items()}

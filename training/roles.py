"""Roles as data: templated turns from `training/data/roles/*.toml`, their slots, and one filled instance of a role.

What is held out for judging (fillings of long slots, one phrasing in eight) is decided by a stable hash of the
text itself, so that adding a role never moves an older line from one side to the other.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

DATA = Path(__file__).parent / "data"
FIRST_ROLES = ("cafe", "teacher", "friend")

Split = Literal["train", "held_out"]
Names = Mapping[str, Mapping[str, str]]  # slot → its values' other names
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa])(?= (?!one\b)[aeioAEIO])")
_HELD_OUT_ONE_IN = 8
_SHORTEST_HELD_OUT_LIST = 4  # shorter lists are all trained on


@dataclass(frozen=True)
class Follow:
    """What may come after an answer: the agent asks, the user replies, the agent closes."""

    agent: str
    user: tuple[str, ...]
    then: tuple[str, ...]


@dataclass(frozen=True)
class Exchange:
    """A question of the user's in several phrasings, and the agent's answers.

    fact: the sentence in the role's prompt that the answer depends on; `distinct` and `times`: the exchange is
    there several times with another filling of that slot; absent: the answer for fillings not in the prompt.
    """

    ask: tuple[str, ...]
    answer: tuple[str, ...]
    fact: str = ""
    times: int = 1
    distinct: str = ""
    absent: tuple[str, ...] = ()
    follow: tuple[Follow, ...] = ()


@dataclass(frozen=True)
class Role:
    name: str
    kind: Literal["service", "talk"]
    prompt: str
    greeting: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    slots: Mapping[str, tuple[str, ...]]
    stories: bool  # the user tells things at length and the agent listens


@dataclass(frozen=True)
class Common:
    """Lines every role shares."""

    user: Mapping[str, tuple[str, ...]]
    agent: Mapping[str, tuple[str, ...]]
    slots: Mapping[str, tuple[str, ...]]
    enrolment: tuple[str, ...]


@dataclass(frozen=True)
class FilledExchange:
    """An exchange with its slots filled; `missing` are fillings of `distinct` that the prompt does not have."""

    exchange: Exchange
    values: Mapping[str, str]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """One agent: a role with its facts."""

    role: Role
    values: Mapping[str, str]
    prompt: str
    exchanges: tuple[FilledExchange, ...] = field(default=())
    names: Names = field(default_factory=dict)  # under which the prompt has them


def held_out(text: str) -> bool:
    """Whether a line or a filling belongs to the held-out side; a function of its text alone."""
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % _HELD_OUT_ONE_IN == 0


def allowed(lines: Sequence[str], split: Split) -> tuple[str, ...]:
    """The lines that `split` may use; held-out items prefer held-out lines and fall back to all."""
    if len(lines) < _SHORTEST_HELD_OUT_LIST:
        return tuple(lines)
    if split == "train":
        return tuple(line for line in lines if not held_out(line)) or tuple(lines)
    return tuple(line for line in lines if held_out(line)) or tuple(lines)


def choose(lines: Sequence[str], split: Split, rng: np.random.Generator) -> str:
    """One of the lines that `split` may use."""
    usable = allowed(lines, split)
    return usable[int(rng.integers(len(usable)))]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Puts values into `{slot}` places, and "an" before a vowel. Raises KeyError naming a slot that has none."""
    text = _SLOT.sub(lambda match: values[match.group(1)], template)
    return _ARTICLE.sub(r"\1n", text)


def slots_of(template: str) -> list[str]:
    """The slots a template has places for, in order."""
    return _SLOT.findall(template)


@functools.cache
def load_common() -> Common:
    raw = tomllib.loads((DATA / "common.toml").read_text(encoding="utf-8"))
    return Common(_lists(raw["user"]), _lists(raw["agent"]), _lists(raw["slots"]), tuple(raw["enrolment"]))


@functools.cache
def load_role(name: str) -> Role:
    """Reads `training/data/roles/<name>.toml`. Raises ValueError for an unknown slot or a malformed exchange."""
    raw = tomllib.loads((DATA / "roles" / f"{name}.toml").read_text(encoding="utf-8"))
    slots = {**load_common().slots, **_lists(raw.get("slots", {}))}
    role = Role(
        name=name,
        kind=raw["kind"],
        prompt=raw["prompt"],
        greeting=tuple(raw["greeting"]),
        exchanges=tuple(_exchange(entry) for entry in raw["exchange"]),
        slots=slots,
        stories=bool(raw.get("stories", False)),
    )
    unknown = {slot for line in lines_of(role) for slot in slots_of(line)} - slots.keys() - {"facts"}
    if unknown:
        raise ValueError(f"role {name} uses slots that have no values: {', '.join(sorted(unknown))}")
    return role


def role_names() -> tuple[str, ...]:
    """All roles there are, the first ones first."""
    every = sorted(path.stem for path in (DATA / "roles").glob("*.toml"))
    return (*FIRST_ROLES, *(name for name in every if name not in FIRST_ROLES))


def lines_of(role: Role) -> list[str]:
    """Every template of a role, the prompt and facts included."""
    lines = [role.prompt, *role.greeting]
    for exchange in role.exchanges:
        lines += [*exchange.ask, *exchange.answer, *exchange.absent]
        lines += [exchange.fact] if exchange.fact else []
        for follow in exchange.follow:
            lines += [follow.agent, *follow.user, *follow.then]
    return lines


def told_slots(role: Role) -> set[str]:
    """The slots whose values a prompt tells, in its own words and in its facts."""
    return {slot for line in (role.prompt, *(each.fact for each in role.exchanges)) for slot in slots_of(line)} - {
        "facts"
    }


def other_names(role: Role, rng: np.random.Generator) -> Names:
    """Other values for all that a role's prompt tells, as many words each, but for those that users ask for by name.

    A voice has said each sentence with two or three of its values, and a model that knows both need not look into the
    prompt. With other values there, and in the text that it writes, it must: they are as many as the prompts. What the
    voice says instead is neither shown nor learnt.
    """
    found = dict[str, dict[str, str]]()
    for slot in sorted(told_slots(role) - {each.distinct for each in role.exchanges}):
        options = allowed(role.slots[slot], "train")
        found[slot] = {}
        for length in sorted({len(option.split()) for option in options}):
            alike = [option for option in options if len(option.split()) == length]
            found[slot] |= {old: alike[int(new)] for old, new in zip(alike, rng.permutation(len(alike)), strict=True)}
    return found


def renamed(values: Mapping[str, str], names: Names) -> dict[str, str]:
    """Slots' values under their other names, where they have one."""
    return {slot: names.get(slot, {}).get(value, value) for slot, value in values.items()}


def instantiate(role: Role, split: Split, rng: np.random.Generator, names: Names | None = None) -> Instance:
    """Fills a role's slots: its own once, those of an exchange that comes several times anew each time.

    The prompt has the values under other names, where there are any.
    """
    names = names or {}
    values = {slot: choose(options, split, rng) for slot, options in sorted(role.slots.items())}
    filled, facts = [], []
    told: set[str] = set()  # slots that an earlier fact has used: breakfast and check-out are not at one time
    for exchange in role.exchanges:
        used: list[str] = []
        group: list[dict[str, str]] = []
        for _ in range(exchange.times):
            own = dict(values)
            if exchange.distinct:
                # Distinct slots draw from the whole list: which items a menu has is not what is held out.
                rest = [option for option in role.slots[exchange.distinct] if option not in used]
                own[exchange.distinct] = rest[int(rng.integers(len(rest)))]
                used.append(own[exchange.distinct])
                for slot in slots_of(exchange.fact):
                    if slot != exchange.distinct:
                        own[slot] = choose(role.slots[slot], split, rng)
            elif exchange.fact:
                for slot in slots_of(exchange.fact):
                    if slot in told:
                        own[slot] = choose(role.slots[slot], split, rng)
                    told.add(slot)
            group.append(own)
            if exchange.fact:
                facts.append(fill(exchange.fact, renamed(own, names)))
        missing = tuple(option for option in role.slots.get(exchange.distinct, ()) if option not in used)
        filled += [FilledExchange(exchange, own, missing) for own in group]
    order = rng.permutation(len(facts))
    information = " ".join(facts[int(i)] for i in order)
    prompt = fill(role.prompt, {**renamed(values, names), "facts": information})
    return Instance(role, values, prompt, tuple(filled), names)


def _lists(table: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {key: tuple(str(value) for value in values) for key, values in table.items()}


def _exchange(entry: Mapping[str, Any]) -> Exchange:
    follows = [Follow(f["agent"], tuple(f["user"]), tuple(f["then"])) for f in entry.get("follow", [])]
    exchange = Exchange(
        ask=tuple(entry["ask"]),
        answer=tuple(entry["answer"]),
        fact=entry.get("fact", ""),
        times=int(entry.get("times", 1)),
        distinct=entry.get("distinct", ""),
        absent=tuple(entry.get("absent", ())),
        follow=tuple(follows),
    )
    if exchange.times > 1 and not exchange.distinct:
        raise ValueError(f"an exchange that comes {exchange.times} times needs a `distinct` slot: {exchange.ask[0]}")
    return exchange

"""The script of a dialogue: who says what, with which gap, pause, interruption or backchannel. Pure and seeded.

A script knows no audio. Times that depend on how long something takes to say are given relative to it ("at 0.6
of the turn before"); the composer resolves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from training.roles import (
    Common,
    FilledExchange,
    Instance,
    Split,
    choose,
    fill,
    instantiate,
    load_common,
    load_role,
    other_names,
    renamed,
    slots_of,
)

Speaker = Literal["agent", "user", "aside"]
Kind = Literal["turn", "interruption", "backchannel", "aside"]

AGENT_VOICES = (
    "af_river", "bf_isabella", "am_onyx", "bm_george",  # the four that Resemblyzer tells apart best, first
    "af_heart", "am_michael", "bf_emma", "am_fenrir", "af_nicole", "bm_lewis", "af_bella", "am_puck",
)  # fmt: skip
USER_VOICES = (
    "af_sarah", "am_adam", "bf_alice", "bm_daniel", "af_kore", "am_echo",
    "af_nova", "am_eric", "bf_lily", "bm_fable", "af_aoede", "am_liam", "af_sky", "af_alloy",
)  # fmt: skip
HELD_OUT_USER_VOICE = "af_jessica"
# Published names, so that clients written for the published server find a voice; the voices are Kokoro's.
VOICE_NAMES = {
    "af_river": "NATF0", "bf_isabella": "NATF1", "af_heart": "NATF2", "bf_emma": "NATF3",
    "am_onyx": "NATM0", "bm_george": "NATM1", "am_michael": "NATM2", "am_fenrir": "NATM3",
    "af_nicole": "VARF0", "af_bella": "VARF1", "bm_lewis": "VARM0", "am_puck": "VARM1",
}  # fmt: skip
DIALOGUES_PER_INSTANCE = 4  # the agent's answers are synthesised once for all of them
YIELD_S = (0.06, 0.18)  # how soon an interrupted agent stops: whoever hears the interruption stops at once
LIVE_S = 42.0  # a script ends at about this length, by its own estimate of 2.6 words a second


@dataclass(frozen=True)
class Turn:
    """Something said. `parts` are spoken with `pauses_s` between them (one fewer than parts).

    gap_s counts from the end of what was said before (negative: overlap). For an interruption or a backchannel
    `at` is where in the other's last turn it begins, as a fraction of that turn's duration; an interrupted agent
    goes silent about `yield_s` later.
    """

    speaker: Speaker
    parts: tuple[str, ...]
    pauses_s: tuple[float, ...] = ()
    gap_s: float = 0.2
    kind: Kind = "turn"
    at: float = 0.0
    yield_s: float = 0.0


@dataclass(frozen=True)
class Fact:
    """A question whose answer stands in the role's prompt."""

    question: str
    answer: str  # as the script has it
    expected: tuple[str, ...]  # what any right answer says ("four fifty"); empty where the prompt has no answer


@dataclass(frozen=True)
class Script:
    """A dialogue before it is spoken. Voices are Kokoro's names."""

    index: int
    split: Split
    role: str
    prompt: str
    agent_voice: str
    user_voice: str
    aside_voice: str
    enrolment: str  # what the voice prompt says
    turns: tuple[Turn, ...]
    facts: tuple[Fact, ...]  # for judging
    told: Mapping[str, str] = field(default_factory=dict)  # what the agent's voice says → what its text says instead


@dataclass(frozen=True)
class Plan:
    """What a data set is made of. Dialogue `index` of a plan is a function of (plan, split, index) alone."""

    seed: int = 5
    roles: tuple[str, ...] = ("cafe", "teacher", "friend")
    agent_voices: int = 4
    user_voices: int = 6
    readings: bool = False  # no dialogues, but `training.readings`
    names: float = 0.5  # of what readings have of the roles: names that dialogues hold out
    per_instance: int = DIALOGUES_PER_INSTANCE
    spoken: bool = False  # only of what the bank speaks already
    renamed: bool = False  # the prompt and the text have other values than the voice: `training.roles.other_names`
    listening: bool = False  # no dialogues, but `training.listening`
    recitals: bool = False  # no dialogues, but `training.recitals`


Speakable = Callable[[str, str], bool]  # (voice, text): whether somebody has said it
_TRIES = 8  # at saying the same thing in other words


def write_script(plan: Plan, split: Split, index: int, speakable: Speakable | None = None) -> Script:
    """Dialogue number `index` of a plan.

    speakable: what a line may be; None: anything. What cannot be said in any words is left out, and its facts remain
    in the prompt. So a bank tells of more instances of a role than it was spoken for, each with facts of its own.
    """
    side = 0 if split == "train" else 1
    who = np.random.default_rng([plan.seed, side, index // plan.per_instance, 1])
    rng = np.random.default_rng([plan.seed, side, index, 2])
    common = load_common()
    role = load_role(plan.roles[int(who.integers(len(plan.roles)))])
    agent_voice = AGENT_VOICES[int(who.integers(plan.agent_voices))]
    names = other_names(role, np.random.default_rng([plan.seed, side, index, 3])) if plan.renamed else {}
    instance = instantiate(role, split, who, names)
    users = [HELD_OUT_USER_VOICE] if split == "held_out" else list(USER_VOICES[: plan.user_voices])
    user_voice = users[int(rng.integers(len(users)))]
    aside_voice = USER_VOICES[int(rng.integers(plan.user_voices))]
    voices = {"agent": agent_voice, "user": user_voice, "aside": aside_voice}

    def sayable(turn: Turn) -> bool:
        return speakable is None or all(speakable(voices[turn.speaker], part) for part in turn.parts)

    writer = _Writer(instance, common, split, rng, sayable)
    writer.run()
    said = {part for turn in writer.turns for part in turn.parts}
    return Script(
        index, split, role.name, instance.prompt, agent_voice, user_voice, aside_voice,
        choose(common.enrolment, "train", rng), tuple(writer.turns), tuple(writer.facts),
        {line: told for line, told in writer.told.items() if line in said},
    )  # fmt: skip


class _Writer:
    def __init__(
        self,
        instance: Instance,
        common: Common,
        split: Split,
        rng: np.random.Generator,
        sayable: Callable[[Turn], bool],
    ) -> None:
        self._sayable = sayable
        self.turns: list[Turn] = []
        self.facts: list[Fact] = []
        self.told: dict[str, str] = {}
        self._instance, self._common, self._split, self._rng = instance, common, split, rng
        self._values: Mapping[str, str] = instance.values

    def run(self) -> None:
        self._said(self._opening)
        queue = [self._instance.exchanges[int(i)] for i in self._rng.permutation(len(self._instance.exchanges))]
        while queue and length_s(self.turns) < LIVE_S:
            self._said(partial(self._exchange, queue.pop(0), queue))
        if self._chance(0.5):
            self._said(self._closing)

    def _said(self, write: Callable[[], None]) -> None:
        """Writes some turns, in other words as long as there are none for them; else nothing."""
        turns, facts = len(self.turns), len(self.facts)
        for _ in range(_TRIES):
            write()
            if all(self._sayable(turn) for turn in self.turns[turns:]):
                return
            del self.turns[turns:], self.facts[facts:]

    def _closing(self) -> None:
        self._user(self._line("user", "bye"), gap_s=self._gap(0.3, 1.5))
        self._agent(self._line("agent", "goodbye"))

    def _opening(self) -> None:
        role = self._instance.role
        greeting = self._filled(choose(role.greeting, self._split, self._rng), self._values)
        if self._chance(0.65):
            self._say("agent", greeting, gap_s=self._gap(0.4, 1.2))
            if self._chance(0.3):
                self._user(self._line("user", "hello"))
                if role.kind == "service":
                    self._agent(self._line("agent", "yielded"))
        else:
            self._user(self._line("user", "hello"), gap_s=self._gap(0.8, 2.5))
            self._agent(greeting)

    def _exchange(self, filled: FilledExchange, queue: list[FilledExchange]) -> None:
        exchange, values = filled.exchange, filled.values
        asks, answers = exchange.ask, exchange.answer
        if exchange.absent and filled.missing and self._chance(0.2):
            item = filled.missing[int(self._rng.integers(len(filled.missing)))]
            values, answers = {**values, exchange.distinct: item}, exchange.absent
        question = fill(choose(asks, self._split, self._rng), values)
        answer = self._filled(answers[int(self._rng.integers(len(answers)))], values)
        if self._chance(0.06):
            self._aside()
        if self._chance(0.12):
            question = f"{self._line('user', 'hesitation')} | {question}"
        listening = self._instance.role.stories and question.count("|") >= 1
        self._question(question, listening)
        if exchange.fact:
            known = [values[slot] for slot in slots_of(exchange.fact) if answers is exchange.answer]
            asked = question.replace("| ", "")
            self.facts.append(Fact(asked, answer, tuple(value for value in known if value not in asked)))
        self._agent(answer)
        if len(answer.split()) >= 9 and queue and self._chance(0.3):
            self._interrupt()
            return
        if len(answer.split()) >= 7 and self._chance(0.3):
            at = float(self._rng.uniform(0.35, 0.9))
            self.turns.append(Turn("user", (self._line("user", "backchannel"),), kind="backchannel", at=at))
        if answers is exchange.answer and exchange.follow and self._chance(0.6):
            follow = exchange.follow[int(self._rng.integers(len(exchange.follow)))]
            self._say("agent", self._filled(follow.agent, values), gap_s=self._gap(0.15, 0.4))
            self._user(fill(choose(follow.user, self._split, self._rng), values))
            self._agent(self._filled(follow.then[int(self._rng.integers(len(follow.then)))], values))
        elif self._chance(0.06):
            self._user(self._line("user", "repeat"))
            self._agent(answer)
        elif self._chance(0.25):
            self._user(self._line("user", "thanks"), gap_s=self._gap(0.1, 0.5))
            if self._chance(0.7):
                self._agent(self._line("agent", "welcome"))

    def _question(self, text: str, listening: bool) -> None:
        """The user asks; at a `|` the user may stop to think, and the agent waits, or murmurs that it listens."""
        pieces = [piece.strip() for piece in text.split("|")]
        if len(pieces) == 1 or not (listening or self._chance(0.5)):
            self._user(" ".join(pieces))
            return
        pauses = tuple(round(float(self._rng.uniform(0.5, 1.8)), 2) for _ in pieces[1:])
        self.turns.append(Turn("user", tuple(pieces), pauses, self._gap(0.25, 1.2)))
        spoken = 0
        total = sum(len(piece.split()) for piece in pieces)
        for piece in pieces[:-1]:
            spoken += len(piece.split())
            if listening and self._chance(0.55):
                murmur = (self._line("agent", "backchannel"),)
                self.turns.append(Turn("agent", murmur, kind="backchannel", at=spoken / total))

    def _interrupt(self) -> None:
        """The user breaks into the agent's last turn; what they want comes right after, as the next question."""
        self.turns.append(
            Turn(
                "user",
                (self._line("user", "interrupt"),),
                kind="interruption",
                at=float(self._rng.uniform(0.25, 0.75)),
                yield_s=float(self._rng.uniform(*YIELD_S)),
            )
        )
        if self._chance(0.35):
            self._agent(self._line("agent", "yielded"))

    def _aside(self) -> None:
        """The user talks to somebody else, or somebody else is heard; the agent stays silent."""
        line = self._line("user", "aside")
        if self._chance(0.5):
            self.turns.append(Turn("aside", (line,), gap_s=self._gap(0.6, 1.5), kind="aside"))
            return
        self._user(line, gap_s=self._gap(0.8, 1.8), kind="aside")
        self._user(self._line("user", "resume"), gap_s=self._gap(1.0, 2.0))
        self._agent(self._line("agent", "resumed"))

    def _user(self, text: str, gap_s: float | None = None, kind: Kind = "turn") -> None:
        # People answer within half a second, or think first.
        gap_s = gap_s if gap_s is not None else self._gap(0.25, 0.7) if self._chance(0.75) else self._gap(0.7, 2.0)
        self._say("user", text.replace(" |", ""), gap_s=gap_s, kind=kind)

    def _agent(self, text: str) -> None:
        # About a fifth of a second between turns is what people do (Stivers et al. 2009); the frame adds 80 ms.
        # Hardly more or less: a model that spreads its chances over half a second lets it pass.
        self._say("agent", text, gap_s=self._gap(0.2, 0.36))

    def _say(self, speaker: Speaker, text: str, *, gap_s: float, kind: Kind = "turn") -> None:
        self.turns.append(Turn(speaker, (text,), gap_s=gap_s, kind=kind))

    def _filled(self, template: str, values: Mapping[str, str]) -> str:
        """An agent's line as it is said. `told` gets what it would be with the prompt's values."""
        said, told = fill(template, values), fill(template, renamed(values, self._instance.names))
        if said != told:
            self.told[said] = told
        return said

    def _line(self, side: Literal["user", "agent"], name: str) -> str:
        table = self._common.user if side == "user" else self._common.agent
        return choose(table[name], self._split if side == "user" else "train", self._rng)

    def _gap(self, low: float, high: float) -> float:
        return round(float(self._rng.uniform(low, high)), 2)

    def _chance(self, probability: float) -> bool:
        return float(self._rng.random()) < probability


def length_s(turns: Sequence[Turn]) -> float:
    """About how long they last."""
    words = sum(len(part.split()) for turn in turns for part in turn.parts)
    return words / 2.6 + sum(turn.gap_s + sum(turn.pauses_s) for turn in turns)


def speech_of(script: Script) -> list[tuple[str, str]]:
    """(voice, text) of every utterance a dialogue needs, the voice prompt first."""
    voices = {"agent": script.agent_voice, "user": script.user_voice, "aside": script.aside_voice}
    wanted = [(script.agent_voice, script.enrolment)]
    wanted += [(voices[turn.speaker], part) for turn in script.turns for part in turn.parts]
    return wanted


def count_templates(roles: Sequence[str]) -> int:
    """Templated turns of these roles and the shared lines: what can be said before any slot is filled."""
    common = load_common()
    total = sum(len(lines) for lines in (*common.user.values(), *common.agent.values()))
    for name in roles:
        role = load_role(name)
        total += len(role.greeting)
        for exchange in role.exchanges:
            total += len(exchange.ask) + len(exchange.answer) + len(exchange.absent)
            total += sum(1 + len(follow.user) + len(follow.then) for follow in exchange.follow)
    return total

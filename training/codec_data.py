"""Batches for the codec: crops of the packed speech, as some microphone would deliver them. Numpy and torch alone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.config import FRAME_SAMPLES, SAMPLE_RATE
from training.augment import coloured_noise, decibels, limited, microphone
from training.prefetch import numbered


class CodecBatch(NamedTuple):
    audio: Tensor  # [batch, frames * 1920] fp32
    semantic: Tensor  # [batch, frames, features] fp32, what a speech encoder hears in the clean signal
    spoken: Tensor  # [batch] bool: whether `semantic` holds for this crop


class PackedSpeech:
    """The shards of one side, mapped."""

    def __init__(self, folder: Path, side: str) -> None:
        """Raises FileNotFoundError if nothing is packed."""
        paths = sorted(folder.glob(f"{side}-???.npy"))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {side} speech: run `python -m training.pack` first")
        self._audio = [np.load(path, mmap_mode="r") for path in paths]
        self._semantic = [np.load(path.with_name(f"{path.stem}-semantic.npy"), mmap_mode="r") for path in paths]
        self._lengths = np.array([len(shard) for shard in self._semantic])

    @property
    def frames(self) -> int:
        return int(self._lengths.sum())

    @property
    def features(self) -> int:
        return int(self._semantic[0].shape[1])

    def crop(self, frames: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """A random stretch, cut at a frame: audio [frames * 1920] in -1 … 1 and semantic [frames, features]."""
        shard = int(rng.choice(len(self._lengths), p=self._lengths / self._lengths.sum()))
        start = int(rng.integers(0, max(1, self._lengths[shard] - frames)))
        audio = self._audio[shard][start * FRAME_SAMPLES : (start + frames) * FRAME_SAMPLES]
        semantic = self._semantic[shard][start : start + frames]
        short = frames - len(semantic)
        return (
            np.pad(audio.astype(np.float32) / 32768.0, (0, short * FRAME_SAMPLES)),
            np.pad(semantic.astype(np.float32), ((0, short), (0, 0))),
        )


def draw(speech: PackedSpeech, batch: int, frames: int, rng: np.random.Generator, *, clean: bool = False) -> CodecBatch:
    """One training batch: mostly clean speech, some of it by voices that do not exist or through a microphone; now
    and then silence, noise or a tone.

    clean: the voices as they are, and no microphone: what is only to be spoken sounds like nothing else.
    """
    audios, semantics, spoken = [], [], []
    for _ in range(batch):
        audio, semantic = speech.crop(frames, rng)
        kind = rng.random()
        if kind < 0.04:
            audio = _no_speech(len(audio), rng)
        elif kind < 0.2 and not clean:
            audio = microphone(audio, rng)
        else:
            if kind < 0.45 and not clean:
                audio = _another_voice(speech, frames, rng)
            audio = limited(audio * np.float32(decibels(float(rng.uniform(-12, 3)))))
        audios.append(audio)
        semantics.append(semantic)
        spoken.append(0.04 <= kind < 0.2 or kind >= 0.45 or (clean and kind >= 0.04))
    return CodecBatch(torch.from_numpy(np.stack(audios)), torch.from_numpy(np.stack(semantics)), torch.tensor(spoken))


def _another_voice(speech: PackedSpeech, frames: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Speech played faster or slower, pitch and formants with it: a throat that none of the voices has."""
    rate = float(rng.uniform(0.85, 1.18))
    audio, _ = speech.crop(int(np.ceil(frames * rate)), rng)
    samples = frames * FRAME_SAMPLES
    taken = audio[: int(samples * rate)]
    spectrum = np.fft.rfft(taken)[: samples // 2 + 1] * (samples / len(taken))
    heard: npt.NDArray[np.float32] = np.fft.irfft(spectrum, samples).astype(np.float32)
    return heard


def _no_speech(samples: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Silence, a tone (the system prompt has a 440 Hz sine) or noise alone."""
    kind = int(rng.integers(4))
    if kind == 0:
        return np.zeros(samples, dtype=np.float32)
    if kind == 1:
        level = np.float32(decibels(-float(rng.uniform(30, 60))))
        return coloured_noise(samples, float(rng.uniform(0, 2)), rng) * level
    hertz = 440.0 if kind == 2 else float(rng.uniform(80, 4000))
    wave = np.sin(2 * np.pi * hertz / SAMPLE_RATE * np.arange(samples) + float(rng.uniform(0, 6.28)))
    tone: npt.NDArray[np.float32] = (wave * float(rng.uniform(0.1, 0.6))).astype(np.float32)
    return tone


def batches(
    speech: PackedSpeech, batch: int, frames: int, seed: int, first: int, *, clean: bool = False
) -> Generator[CodecBatch, None, None]:
    """Batches number first, first + 1, …; batch n is a function of (seed, n). To be closed."""
    return numbered(
        lambda number: draw(speech, batch, frames, np.random.default_rng([seed, number]), clean=clean), first
    )

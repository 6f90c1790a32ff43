"""Packed speech, small enough to travel to a GPU machine: `python -m training.carry pack`, there `… unpack`.

Audio as Opus (13 MB an hour at 30 kb/s), the speech encoder's features as 48 principal components in int8 (2 MB an
hour). Unpacking needs the package soundfile beside numpy.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.config import SAMPLE_RATE
from training.folders import state_folder
from training.pack import pcm_folder

COMPONENTS = 48
_OPUS_LEVEL = 0.9  # libsndfile's 0 … 1, from most to fewest bits: 30 kb/s, as measured on this speech
_FIT_FRAMES = 20_000


def principal(features: npt.NDArray[np.float32], components: int) -> tuple[npt.NDArray[np.float32], ...]:
    """(mean [dim], axes [components, dim], scale [components]): scale is what int8's 127 stands for."""
    mean = features.mean(0)
    _, _, axes = np.linalg.svd(features - mean, full_matrices=False)
    axes = axes[:components]
    scale = np.abs((features - mean) @ axes.T).max(0)
    return mean.astype(np.float32), axes.astype(np.float32), scale.astype(np.float32)


def pack(source: Path, target: Path, shards: int) -> int:
    """Writes up to `shards` shards of training speech and all of validation. Returns the bytes written."""
    soundfile: Any = importlib.import_module("soundfile")
    target.mkdir(parents=True, exist_ok=True)
    paths = [*sorted(source.glob("train-???.npy"))[:shards], *sorted(source.glob("val-???.npy"))]
    if not paths:
        raise FileNotFoundError(f"{source} has no speech: run `python -m training.pack` first")
    heard = [np.load(path.with_name(f"{path.stem}-semantic.npy")).astype(np.float32) for path in paths]
    mean, axes, scale = principal(np.concatenate(heard)[:_FIT_FRAMES], COMPONENTS)
    np.savez(target / "axes.npz", mean=mean, axes=axes, scale=scale)
    for path, features in zip(paths, heard, strict=True):
        small = np.clip(np.round((features - mean) @ axes.T / scale * 127), -127, 127).astype(np.int8)
        np.savez_compressed(target / f"{path.stem}.npz", semantic=small)
        soundfile.write(
            target / f"{path.stem}.opus", np.load(path), SAMPLE_RATE, format="OGG", subtype="OPUS",
            compression_level=_OPUS_LEVEL,
        )  # fmt: skip
    return sum(path.stat().st_size for path in target.iterdir())


def unpack(source: Path, target: Path) -> int:
    """Makes the folder that the codec trains from. Returns the frames of training speech."""
    soundfile: Any = importlib.import_module("soundfile")
    target.mkdir(parents=True, exist_ok=True)
    shared = np.load(source / "axes.npz")
    frames = 0
    for path in sorted(source.glob("*.opus")):
        small = np.load(path.with_suffix(".npz"))["semantic"].astype(np.float32)
        features = small / 127 * shared["scale"] @ shared["axes"] + shared["mean"]
        np.save(target / f"{path.stem}-semantic.npy", features.astype(np.float16))
        np.save(target / f"{path.stem}.npy", soundfile.read(path, dtype="int16")[0])
        frames += len(features) if path.stem.startswith("train") else 0
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("direction", choices=("pack", "unpack"))
    parser.add_argument("--shards", type=int, default=18, help="five minutes of training speech each")
    parser.add_argument("--carry", type=Path, default=state_folder() / "carry")
    parser.add_argument("--pcm", type=Path, default=pcm_folder())
    arguments = parser.parse_args()
    if arguments.direction == "pack":
        print(f"{pack(arguments.pcm, arguments.carry, arguments.shards) / 2**20:.1f} MiB in {arguments.carry}")
    else:
        print(f"{unpack(arguments.carry, arguments.pcm)} frames in {arguments.pcm}")


if __name__ == "__main__":
    main()

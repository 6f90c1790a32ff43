"""Fits the codebooks to what the encoder hears: `python -m training.fit_codebooks`, once, when it hears well enough.

The latent has two linear readings, columns of a spectrogram and a speech encoder's features (training/hearing.py).
The semantic codebook quantizes the principal components of the second, the seven acoustic ones those of the first,
each what the others left over. So an error of the codes is counted as an error of what is heard, entries are where
speech is (k-means; none is dead), and no decoder has to be trained to know what codes are worth: a spectrogram read
from them can be listened to (`columns_of`). Writes the codec's folder; from then on its codes do not change.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.mimi import Mimi
from models.mimi_quantizer import Codebook, ResidualQuantizer, nearest
from training import codec_model
from training.codec_data import PackedSpeech, draw
from training.codec_model import encodes, hears
from training.folders import FROZEN, state_folder
from training.hearing import Hearing, load_hearing
from training.optim import without_moments
from training.piece import progress
from training.spectrogram import columns
from training.state import load_state, save_state

_CROP_FRAMES = 36
_BASIS = "columns.safetensors"


@dataclass(frozen=True)
class Reading:
    """How columns are read from the sum of the acoustic entries, and the axes of both kinds of codebooks."""

    basis: Tensor  # [WIDTH, dim]
    mean: Tensor  # [WIDTH]
    semantic: Tensor  # [features, dim]

    @staticmethod
    def load(folder: Path) -> Reading:
        return Reading(**load_file(folder / _BASIS))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, folder / _BASIS)


def k_means(points: Tensor, entries: int, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """Lloyd's algorithm: points [n, dim] → centres [entries, dim]. A centre nobody chose moves to a random point."""
    centres = points[torch.randint(len(points), (entries,), generator=generator)].clone()
    for _ in range(rounds):
        chosen = _assign(points, centres)
        count = torch.bincount(chosen, minlength=entries)
        sums = torch.zeros_like(centres).index_add_(0, chosen, points)
        centres = sums / count.clamp(min=1).unsqueeze(1)
        empty = (count == 0).nonzero()[:, 0]
        centres[empty] = points[torch.randint(len(points), (len(empty),), generator=generator)]
    return centres


def _assign(points: Tensor, centres: Tensor) -> Tensor:
    norms = centres.square().sum(1)
    return torch.cat([nearest(part, centres, norms) for part in torch.split(points, 8192)])


class Sample(NamedTuple):
    """Some speech, row by row a frame: what the encoder makes of it, and what it was to be read as."""

    latents: Tensor  # [frames, dim]
    columns: Tensor  # [frames, WIDTH]
    features: Tensor  # [frames, features], of the speech encoder


@torch.no_grad()
def fit(mimi: Mimi, hearing: Hearing, sample: Sample, generator: torch.Generator) -> Reading:
    """Sets projections and codebooks. Returns how columns are read from the acoustic ones.

    Axes and their scales are the originals', not the encoder's: fitted again to an encoder that has learnt more, a
    number of the latent still means the same to a decoder.
    """
    first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    size, total = first.input_proj.weight.shape[0], mimi.config.num_codebooks
    sides = [
        (first, hearing.features, principal_axes(sample.features, size), sample.features),
        (rest, hearing.columns, principal_axes(sample.columns, size), sample.columns),
    ]
    done = 0
    for place, (split, reading, axes, original) in enumerate(sides):
        project = _project(split, reading, axes)
        spread = (original @ axes).std()
        split.output_proj.weight.copy_(_places(mimi.config.seanet.dimension, place, size, spread).unsqueeze(2))
        points = sample.latents @ project.t()
        for codebook in split.codebooks():
            entries = len(codebook.cluster_usage)
            if done == total:  # a codec may store more codebooks than are used
                _store(codebook, points.new_zeros(1, size))
                continue
            centres = k_means(points, entries, generator)
            _store(codebook, centres)
            points = points - centres[_assign(points, centres)]
            done += 1
            progress(done, total, "codebooks", {"left": float(points.std() / spread)})
    _repeat(mimi, size)
    mimi.unpack()
    # A latent's columns are weight · latent + bias; of them the codes tell what lies along the axes.
    axes, bias = sides[1][2], hearing.columns.bias
    mean = hearing.columns.weight @ sample.latents.mean(0)
    return Reading(axes, bias + mean - axes @ (axes.t() @ mean), sides[0][2])


@torch.no_grad()
def take_over(mimi: Mimi, hearing: Hearing, reading: Reading) -> None:
    """Gives a codec the encoder of `hearing` under the codebooks it has: the same codes for the same columns."""
    own = mimi.state_dict()
    mimi.load_state_dict(own | {name: t for name, t in hearing.mimi.state_dict().items() if encodes(name)})
    _project(mimi.quantizer.rvq_first, hearing.features, reading.semantic)
    _project(mimi.quantizer.rvq_rest, hearing.columns, reading.basis)
    mimi.unpack()


def _project(split: ResidualQuantizer, reading: nn.Linear, axes: Tensor) -> Tensor:
    """Makes a split look at a reading of the latent along some axes; returns the projection [size, dim]."""
    project = axes.t() @ reading.weight
    split.input_proj.weight.copy_(project.unsqueeze(2))
    return project


def principal_axes(points: Tensor, count: int) -> Tensor:
    """The directions [dim, count] along which points [n, dim] differ most, orthonormal, of a sign that is defined."""
    _, vectors = torch.linalg.eigh(torch.cov(points.t()))  # by ascending variance
    axes = torch.flip(vectors, (1,))[:, :count]
    return axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))


def _store(codebook: Codebook, centres: Tensor) -> None:
    codebook.embedding_sum.copy_(centres.expand_as(codebook.embedding_sum))
    codebook.cluster_usage.fill_(1.0)
    codebook._initialized.fill_(1.0)


def _places(dim: int, place: int, size: int, spread: Tensor) -> Tensor:
    """Where a split's components go in the latent, [dim, size]: semantic ones, acoustic ones, and both again."""
    unit = torch.zeros(dim, size)
    for start in range(place * size, dim - size + 1, 2 * size):
        unit[start : start + size] = torch.eye(size) / spread
    return unit


def _repeat(mimi: Mimi, size: int) -> None:
    """Gives both positions of a frame its latent; every second copy to one of them alone, which tells them apart."""
    weight = mimi.upsample.inner.weight  # [dim, 1, kernel]: this frame's first and second position, then the next's
    weight.zero_()
    for copy, start in enumerate(range(0, len(weight), 2 * size)):
        for position in range(2):
            if copy % 2 == 0 or (copy // 2) % 2 == position:
                weight[start : start + 2 * size, 0, position] = 1.0


def columns_of(mimi: Mimi, reading: Reading, codes: Tensor) -> Tensor:
    """codes [batch, frames, codebooks] → the columns they tell, [batch, frames, WIDTH]."""
    summed = torch.zeros(*codes.shape[:2], reading.basis.shape[1])
    for index, codebook in enumerate(mimi.quantizer.codebooks()[1:], start=1):
        summed = summed + codebook.entries()[codes[:, :, index]]
    return summed @ reading.basis.t() + reading.mean


def use_of(codes: Tensor, entries: int) -> list[float]:
    """Share of each codebook's entries that occur in codes [rows, codebooks]."""
    return [len(torch.unique(codes[:, index])) / entries for index in range(codes.shape[1])]


@torch.no_grad()
def gather(hearing: Hearing, speech: PackedSpeech, batches: int) -> Sample:
    """So many batches of four crops."""
    parts = []
    for number in range(batches):
        batch = draw(speech, 4, _CROP_FRAMES, np.random.default_rng([29, number]))
        parts.append((hearing.latent(batch.audio), columns(batch.audio), batch.semantic))
        progress(number + 1, batches, "latents", {})
    return Sample(*(torch.cat([part.flatten(0, 1) for part in kind]) for kind in zip(*parts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hearing", type=Path, default=state_folder() / "hearing")
    parser.add_argument("--folder", type=Path, default=state_folder() / "codec")
    parser.add_argument("--pcm", type=Path, default=state_folder() / "pcm")
    parser.add_argument("--batches", type=int, default=900, help="of four crops of 2.88 s")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.nice(max(0, 19 - os.nice(0)))
    torch.set_num_threads(arguments.threads)
    speech = PackedSpeech(arguments.pcm, "train")
    hearing, step = load_hearing(arguments.hearing, speech.features)
    before = load_state(arguments.folder)
    if (arguments.folder / FROZEN).exists():
        assert before is not None
        print(_take_over(arguments.folder, hearing, step, *before))
        return
    sample = gather(hearing, speech, arguments.batches)
    fit(hearing.mimi, hearing, sample, torch.Generator().manual_seed(3)).save(arguments.folder)
    tensors = {f"mimi.{name}": tensor for name, tensor in hearing.mimi.state_dict().items()}
    decoder_step = 0
    if before is not None:  # fitted before: the decoder goes on from where it was
        tensors |= {name: tensor for name, tensor in without_moments(before[0]).items() if not _fitted(name)}
        decoder_step = int(before[1]["step"])
    save_state(arguments.folder, tensors, {"step": decoder_step, "kind": "codec", "hearing_step": step})
    print(f"\ncodebooks fitted to the encoder of step {step}; decoder of step {decoder_step} in {arguments.folder}")


def _take_over(folder: Path, hearing: Hearing, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Saves a frozen codec with a newer encoder; says so."""
    mimi = Mimi(codec_model.CONFIG)
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("mimi.")}
    mimi.load_state_dict({name.removeprefix("mimi."): tensor for name, tensor in own.items()})
    take_over(mimi, hearing, Reading.load(folder))
    heard = {f"mimi.{name}": tensor for name, tensor in mimi.state_dict().items() if hears(name)}
    save_state(folder, {**tensors, **heard}, {**about, "hearing_step": step})
    return f"codebooks are final and stay; the encoder of step {step} instead of {about['hearing_step']} in {folder}"


def _fitted(name: str) -> bool:
    """Whether a tensor of a codec's state is this stage's to set."""
    name = name.removeprefix("average.").removeprefix("mimi.")
    return hears(name) or "output_proj" in name or name.startswith("upsample.")


if __name__ == "__main__":
    main()

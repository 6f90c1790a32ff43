"""`demo-random`: a small checkpoint of the same architecture, with random weights, made on first use.

It is also what `demo` means where no trained one ships (models.checkpoint_files). It cannot speak (config.json says
`trained: false`); it exercises every part that the published weights do.
Weights are exact on any machine: integers from PCG64, scaled; no library's notion of "normal" is involved.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint_files import CONFIG, FORMAT, VOICES_FOLDER, CheckpointError
from models.config import (
    AUDIO_CODEBOOKS,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    TEXT_PAD,
    CodecTransformerConfig,
    LMConfig,
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
)
from models.lm import LanguageModel
from models.mimi import Mimi
from models.voices import write_codes

RECIPE = 1  # part of the folder's name: raise it with any change below, or old folders stay in use
HOME_VARIABLE = "PERSONAPLEX_HOME"
TOKENIZER = Path(__file__).parent / "assets" / "demo_tokenizer.model"

LM = LMConfig(
    dim=320,
    text_card=2_000,
    dep_q=AUDIO_CODEBOOKS,
    num_heads=5,
    num_layers=8,
    context=750,
    depformer_dim=128,
    depformer_dim_feedforward=528,
    depformer_num_heads=2,
    depformer_num_layers=2,
)
MIMI = MimiConfig(
    seanet=SeanetConfig(dimension=256, n_filters=16),
    transformer=CodecTransformerConfig(d_model=256, num_heads=4, num_layers=4, dim_feedforward=1024),
    quantizer=QuantizerConfig(dimension=128, n_q=AUDIO_CODEBOOKS),
)

# Costs next to nothing: for measurements of what stands around the model.
TINY_LM = dataclasses.replace(
    LM, dim=16, card=64, num_heads=2, num_layers=2, context=200, depformer_dim=8, depformer_dim_feedforward=32
)
TINY_MIMI = MimiConfig(
    seanet=SeanetConfig(dimension=16, n_filters=2),
    transformer=CodecTransformerConfig(d_model=16, num_heads=2, num_layers=1, context=20, dim_feedforward=32),
    quantizer=QuantizerConfig(dimension=8, n_q=AUDIO_CODEBOOKS, bins=64),
)

# The published names, so that clients written for the published server find their voice.
VOICES = tuple(
    f"{kind}{i}" for kind, count in (("NATF", 4), ("NATM", 4), ("VARF", 5), ("VARM", 5)) for i in range(count)
)
VOICE_FRAMES = 40  # 3.2 s

_SETTLE_FRAMES = 8  # the codec's output for a constant input has settled well before this
_SINE_HZ, _SINE_AMPLITUDE = 440.0, 0.5

# Dimension 0 of the residual stream is a constant, so that a head can have a bias though it has no such tensor.
_CONSTANT = 0.25  # of each of the 17 summed embeddings
_PAD_BIAS = 2.8  # most frames say nothing, as in speech: text would otherwise scroll by at 12.5 tokens a second
_UNREADABLE = slice(4, 260)  # the tokenizer's raw bytes

# Standard deviation of each kind of weight, times the square root of its fan-in; the first pattern that matches
# holds. Chosen so that activations stay near 1 through all layers.
_LM_GAINS = (
    (r"(text_)?emb\..*", 17**-0.5),  # 17 of them are summed
    (r"depformer(_text)?_emb\..*", 1.0),
    (r".*(out_proj|linear_out)\.weight", 0.7),  # what branches add to the residual stream
    (r".*", 1.0),
)
_MIMI_GAINS = (
    (r"decoder\.model\.14\..*", 0.032),  # the loudness: about -24 dBFS
    (r".*block\.3\..*|.*(out_proj|linear2)\.weight", 0.7),
    (r".*", 1.2),  # an ELU takes some of the variance away
)
_CODEBOOK_SPREAD = 0.7  # of entries around the latents they stand for


def ensure_demo_checkpoint(home: Path | None = None) -> Path:
    """The folder of the demo checkpoint, generated if it is not there yet (some seconds).

    home: by default $PERSONAPLEX_HOME, else ~/.cache/personaplex. Several processes may ask at once: each writes
    a folder of its own, the first to rename it wins, and all of them hold the same bytes.
    Raises CheckpointError if the folder cannot be written.
    """
    home = home or Path(os.environ.get(HOME_VARIABLE) or "~/.cache/personaplex").expanduser()
    final = home / f"demo-{RECIPE}"
    if (final / CONFIG).is_file():
        return final
    try:
        home.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=home))
        try:
            write_demo_checkpoint(staging)
            _publish(staging, final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be written to {home} ({error.strerror or error}): "
            f"set {HOME_VARIABLE} to a folder that can, with 100 MB free"
        ) from error
    return final


def _publish(staging: Path, final: Path) -> None:
    try:
        staging.rename(final)
    except OSError:
        if not (final / CONFIG).is_file():  # not lost to another process: something else is in the way
            raise


def write_demo_checkpoint(folder: Path, lm_config: LMConfig = LM, mimi_config: MimiConfig = MIMI) -> None:
    """Writes all files of the demo checkpoint, or of one with other shapes, into an existing folder."""
    lm, mimi = random_lm(lm_config), random_mimi(mimi_config)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in lm.items()}, folder / "model.safetensors")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in mimi.items()}, folder / "mimi.safetensors")
    shutil.copyfile(TOKENIZER, folder / "tokenizer.model")
    (folder / VOICES_FOLDER).mkdir()
    for name in VOICES:
        codes = _integers(f"voice {name}", VOICE_FRAMES * AUDIO_CODEBOOKS, mimi_config.quantizer.bins)
        path = folder / VOICES_FOLDER / f"{name}.safetensors"
        path.write_bytes(write_codes(torch.from_numpy(codes).view(VOICE_FRAMES, AUDIO_CODEBOOKS)))
    silence, sine = constant_codes(mimi_config, mimi)
    config = {
        "format": FORMAT,
        "name": "personaplex-demo-untrained",
        "trained": False,
        "lm": dataclasses.asdict(lm_config),
        "mimi": dataclasses.asdict(mimi_config),
        "silence_codes": silence,
        "sine_codes": sine,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def write_short_memory(folder: Path, context: int, codec_context: int) -> None:
    """The demo checkpoint with windows of `context` frames and `codec_context` positions of 40 ms: what takes minutes
    to wrap wraps in seconds, for tests of what happens then. Makes the folder."""
    folder.mkdir(parents=True)
    transformer = dataclasses.replace(MIMI.transformer, context=codec_context)
    lm, mimi = dataclasses.replace(LM, context=context), dataclasses.replace(MIMI, transformer=transformer)
    write_demo_checkpoint(folder, lm, mimi)


def random_lm(config: LMConfig) -> dict[str, Tensor]:
    """Name → fp32 tensor of a language model with well-scaled random weights that mostly stays silent in text."""
    shapes = LanguageModel(config, device="meta").state_dict()
    weights = {name: _lm_tensor(name, tuple(tensor.shape)) for name, tensor in shapes.items()}
    for name, tensor in weights.items():
        if re.fullmatch(r"(text_)?emb\..*", name):
            tensor[:, 0] = _CONSTANT
    bias = weights["text_linear.weight"][:, 0]
    bias[:] = 0.0
    bias[:TEXT_PAD] = -_PAD_BIAS
    bias[_UNREADABLE] = -_PAD_BIAS
    bias[TEXT_PAD] = _PAD_BIAS
    return weights


def _lm_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith(".alpha"):
        return torch.ones(shape)
    is_table = "emb." in name
    return _random(name, shape, _gain(_LM_GAINS, name) / (1.0 if is_table else math.sqrt(shape[1])))


def random_mimi(config: MimiConfig) -> dict[str, Tensor]:
    """Name → fp32 tensor of a codec with random weights that turns codes into quiet babble."""
    with torch.device("meta"):
        shapes = Mimi(config).state_dict()
    return {name: _mimi_tensor(name, tuple(tensor.shape)) for name, tensor in shapes.items()}


def _mimi_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if ("norm" in name and name.endswith("weight")) or name.endswith(("_initialized", "cluster_usage")):
        return torch.ones(shape)
    if "norm" in name:
        return torch.zeros(shape)
    if name.endswith(".scale"):
        return torch.full(shape, 0.3)
    if name.endswith("embedding_sum"):
        return _random(name, shape, _CODEBOOK_SPREAD)
    if name.endswith(".bias"):
        return _random(name, shape, 0.1 * _gain(_MIMI_GAINS, name))
    transposed = "convtr" in name  # [in, out, kernel]; every output hears two taps of every input
    fan_in = shape[0 if shape[1] > 1 else 1] * 2 if transposed else math.prod(shape[1:])
    return _random(name, shape, _gain(_MIMI_GAINS, name) / math.sqrt(fan_in))


@torch.inference_mode()
def constant_codes(
    config: MimiConfig,
    weights: dict[str, Tensor],
    *,
    stored: torch.dtype = torch.bfloat16,
    frames: int = _SETTLE_FRAMES,
) -> tuple[list[int], list[int]]:
    """What this codec makes of silence and of a 440 Hz sine, once settled: twice 8 codes.

    stored: the precision of the file it is loaded from; another one's codes may be others. frames: after how many it
    has settled.
    """
    mimi = Mimi(config)
    mimi.load_state_dict({name: tensor.to(stored).float() for name, tensor in weights.items()})
    samples = torch.arange(frames * FRAME_SAMPLES, dtype=torch.float64)
    sine = _SINE_AMPLITUDE * torch.sin(2 * math.pi * _SINE_HZ / SAMPLE_RATE * samples)
    codes = mimi.eval().encode_sequence(torch.stack([torch.zeros_like(sine), sine]).float())
    return codes[0, -1].tolist(), codes[1, -1].tolist()


def _gain(table: tuple[tuple[str, float], ...], name: str) -> float:
    return next(gain for pattern, gain in table if re.fullmatch(pattern, name))


def _random(name: str, shape: tuple[int, ...], deviation: float) -> Tensor:
    """Uniform fp32 numbers of zero mean and that standard deviation; the tensor's name is the seed."""
    bits = _raw(name, math.prod(shape)) >> np.uint64(40)  # 24 bits: exactly what a float32 holds
    unit = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23) - np.float32(1.0)
    return torch.from_numpy(unit * np.float32(math.sqrt(3.0) * deviation)).view(shape)


def _integers(name: str, count: int, limit: int) -> npt.NDArray[np.int64]:
    return (_raw(name, count) % np.uint64(limit)).astype(np.int64)


def _raw(name: str, count: int) -> npt.NDArray[np.uint64]:
    """`random_raw` of a bit generator is the one stream numpy promises never to change."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    raw: npt.NDArray[np.uint64] = np.random.PCG64(seed).random_raw(count)
    return raw


def _main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the demo checkpoint with short windows, or a tiny one, into a new folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=LM.context, help="frames (80 ms) the language model remembers")
    parser.add_argument(
        "--codec-context", type=int, default=MIMI.transformer.context, help="positions (40 ms) the codec remembers"
    )
    parser.add_argument("--tiny", action="store_true", help="one that costs next to nothing to run instead")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.folder.mkdir(parents=True)
        write_demo_checkpoint(arguments.folder, TINY_LM, TINY_MIMI)
        return
    write_short_memory(arguments.folder, arguments.context, arguments.codec_context)


if __name__ == "__main__":
    _main()

"""What every benchmark is set up with: shapes, models of random weights, a device, and the options that choose them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from models import demo_checkpoint
from models.config import CodecTransformerConfig, LMConfig, MimiConfig, QuantizerConfig, SeanetConfig
from models.lm import LanguageModel
from models.mimi import Mimi

# "tiny" is for trying a script out: every part of the architecture in milliseconds.
SHAPES: dict[str, tuple[LMConfig, MimiConfig]] = {
    "demo": (demo_checkpoint.LM, demo_checkpoint.MIMI),
    "7b": (LMConfig(), MimiConfig()),
    "tiny": (
        LMConfig(
            dim=64,
            text_card=64,
            card=64,
            num_heads=2,
            num_layers=2,
            context=300,
            depformer_dim=32,
            depformer_dim_feedforward=96,
            depformer_num_heads=2,
            depformer_num_layers=1,
        ),
        MimiConfig(
            seanet=SeanetConfig(dimension=32, n_filters=2),
            transformer=CodecTransformerConfig(d_model=32, num_heads=2, num_layers=1, context=20, dim_feedforward=32),
            quantizer=QuantizerConfig(dimension=16, n_q=8, bins=64),
        ),
    ),
}


@dataclass(frozen=True)
class Setting:
    """Where to measure, and what shapes."""

    device: torch.device
    lm: LMConfig
    mimi: MimiConfig


def options(program: str, doc: str | None, *, shape: str = "demo") -> argparse.ArgumentParser:
    """A parser with what every benchmark lets one choose; `doc` is its module's."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=(doc or "").split("\n")[0])
    parser.add_argument("--shape", default=shape, help="demo, 7b, tiny (to try a script out), or a checkpoint's folder")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU; the server uses one")
    return parser


def setting(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setting:
    """What was chosen, with torch's threads set to it. Ends the program, saying why, if there is no such thing."""
    try:
        chosen = Setting(pick_device(arguments.device), *shapes_of(arguments.shape))
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    return chosen


def shapes_of(name: str) -> tuple[LMConfig, MimiConfig]:
    """The shapes called `name`, or those of a checkpoint's folder. Raises ValueError if it is neither."""
    if name in SHAPES:
        return SHAPES[name]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(f"{name!r} is neither {' nor '.join(SHAPES)} nor a folder with a config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    return LMConfig.from_dict(config.get("lm", {})), MimiConfig.from_dict(config.get("mimi", {}))


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ValueError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"{name!r} is no device; choose auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can see (--device cpu works)")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def random_lm(config: LMConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A language model whose weights are noise of a size at which nothing overflows."""
    model = LanguageModel(config, device=device, dtype=dtype).eval()
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms stay ones
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def random_mimi(config: MimiConfig, device: torch.device) -> Mimi:
    """A codec with torch's own initial weights and random codebooks."""
    torch.manual_seed(0)
    mimi = Mimi(config).eval()
    with torch.no_grad():
        for name, buffer in mimi.named_buffers():
            if name.endswith("embedding_sum"):
                buffer.normal_()
            elif name.endswith("cluster_usage"):
                buffer.fill_(1.0)
    mimi.unpack()
    return mimi.to(device)

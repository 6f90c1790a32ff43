"""What a stage is built from and what it says about itself. Without torch: whoever starts the actors needs no more."""

from __future__ import annotations

from dataclasses import dataclass

ANCHOR_S = 120.0


@dataclass(frozen=True, slots=True)
class StageConfig:
    """What a stage is built from. `dtype` is the language model's: None is bf16, or fp32 on a CPU without numba."""

    checkpoint: str = "demo"  # a folder, a Hugging Face repository id, "demo" or "demo-random"
    slots: int = 4
    device: str = "cpu"
    dtype: str | None = None  # "float32" or "bfloat16"
    threads: int = 1
    # The language model re-reads its prompt and its most recent frames so often, once its context is full; 0: never.
    anchor_s: float = ANCHOR_S
    # See graphs.backends.Backends. `auto`: what a self-test finds right, stable and faster.
    attention: str = "ours"
    linear: str = "ours"
    kv_dtype: str = "auto"
    kv_overcommit: float = 1.0
    kv_reserve_s: float = 30.0  # graphs.kv_pressure.RESERVE_S, without torch


@dataclass(frozen=True, slots=True)
class StageDescription:
    """What a stage says about itself once it is up."""

    stage: str  # "encoder", "engine" or "decoder"
    checkpoint: str
    trained: bool  # False: random weights, it cannot speak yet
    slots: int
    device: str
    numerics_id: str  # stages of equal id compute equal bits
    receptive_frames: int  # of the checkpoint's codec: what a journal keeps of audio and codes
    load_s: float  # from the start of loading to warmed up
    memory_bytes: int  # on a GPU what torch has reserved there, on a CPU the process's resident set


def combined_numerics_id(stages: list[StageDescription]) -> str:
    """The id of a replica: its stages' ids, each said once."""
    return "+".join(dict.fromkeys(stage.numerics_id for stage in stages))


def checkpoints_of(numerics_id: str) -> frozenset[str]:
    """The weights that a replica's id names: each stage's id begins with their hash, the codec's after its own name."""
    stages = [stage.removeprefix("mimi-") for stage in numerics_id.split("+")]
    return frozenset(weights for stage in stages if (weights := stage.partition("-")[0]))

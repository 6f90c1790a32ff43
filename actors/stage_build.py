"""What runs inside the stage actors: a checkpoint's parts loaded, warmed up and put behind a gate. No Ray here."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from actors.codec_stage import CODEBOOKS, FRAME_SAMPLES, DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.stage_config import StageConfig, StageDescription
from graphs.anchors import AnchorPolicy
from graphs.backends import Backends, default_dtype
from graphs.codec import DecoderLane, EncoderLane
from graphs.engine import ConversationEngine
from graphs.stages import SessionSpec
from models.checkpoint import Checkpoint, load_checkpoint

__all__ = [
    "StageConfig",
    "StageDescription",
    "build_decoder",
    "build_encoder",
    "build_engine",
    "use_threads",
    "with_memory",
]

log = logging.getLogger(__name__)

WARM_UP_FRAMES = 2  # the first pays for allocations and thread pools, the second shows that nothing is left to pay


def build_encoder(config: StageConfig) -> tuple[EncoderStage, StageDescription]:
    """Raises models.checkpoint.CheckpointError, as the other two do."""
    started = time.monotonic()
    checkpoint = _load(config, "mimi")
    assert checkpoint.mimi is not None
    lane = EncoderLane(checkpoint.mimi, config.slots, device=config.device)
    for _ in range(WARM_UP_FRAMES):
        lane.run(range(config.slots), np.zeros((config.slots, FRAME_SAMPLES), dtype=np.int16))
    for slot in range(config.slots):
        lane.reset(slot)
    codec = _codec_id(checkpoint, config, lane.group)
    stage = EncoderStage(lane, config.slots, receptive=checkpoint.mimi_config.receptive_frames)
    return stage, _describe("encoder", checkpoint, config, codec, started)


def build_decoder(config: StageConfig) -> tuple[DecoderStage, StageDescription]:
    started = time.monotonic()
    checkpoint = _load(config, "mimi")
    assert checkpoint.mimi is not None
    lane = DecoderLane(checkpoint.mimi, config.slots, device=config.device)
    for _ in range(WARM_UP_FRAMES):
        lane.run(range(config.slots), np.zeros((config.slots, CODEBOOKS), dtype=np.int16))
    for slot in range(config.slots):
        lane.reset(slot)
    codec = _codec_id(checkpoint, config, lane.group)
    card, receptive = checkpoint.mimi_config.quantizer.bins, checkpoint.mimi_config.receptive_frames
    stage = DecoderStage(lane, config.slots, card, receptive=receptive)
    return stage, _describe("decoder", checkpoint, config, codec, started)


def build_engine(config: StageConfig) -> tuple[EngineStage, StageDescription]:
    started = time.monotonic()
    checkpoint = _load(config, "lm", "text")
    backends = Backends(
        attention=config.attention,
        linear=config.linear,
        kv_dtype=config.kv_dtype,
        kv_overcommit=config.kv_overcommit,
        kv_reserve_s=config.kv_reserve_s,
    )
    anchors = AnchorPolicy.of_seconds(config.anchor_s)
    engine = ConversationEngine(checkpoint, config.slots, anchors=anchors, backend=backends)
    _read_voices(checkpoint)
    _warm_up(engine, checkpoint)
    numerics_id = f"{engine.numerics_id}{_threads_id(config)}"
    memory = engine if engine.overcommitted else None
    stage = EngineStage(engine, config.slots, checkpoint.lm_config.card, memory=memory)
    return stage, _describe("engine", checkpoint, config, numerics_id, started)


def with_memory(description: StageDescription) -> StageDescription:
    """The description with the memory held now."""
    return replace(description, memory_bytes=_memory_bytes(torch.device(description.device)))


def use_threads(config: StageConfig) -> None:
    """How many threads torch's operators use, when this thread calls them."""
    torch.set_num_threads(config.threads)


def _load(config: StageConfig, *parts: str) -> Checkpoint:
    # Threads first: tensors that are loaded and checked on many threads would steal the neighbours' 80 ms.
    use_threads(config)
    dtype = default_dtype(torch.device(config.device)) if config.dtype is None else getattr(torch, config.dtype)
    return load_checkpoint(config.checkpoint, device=config.device, dtype=dtype, parts=frozenset(parts))


def _read_voices(checkpoint: Checkpoint) -> None:
    """Reads every voice now: reading one takes longer than a frame, and would come between other calls' frames."""
    for name in checkpoint.voices.names():
        try:
            checkpoint.voices.load(name)
        except ValueError as error:
            log.warning("voice %s cannot be used: %s", name, error)  # and whoever asks for it is told the same


def _warm_up(engine: ConversationEngine, checkpoint: Checkpoint) -> None:
    """One short conversation in slot 0, so that the first real one meets no compilation and no allocation."""
    for name in checkpoint.voices.names():
        try:
            engine.open(0, SessionSpec(name, "", 0))
        except ValueError:
            continue
        while not engine.step((), np.zeros((0, CODEBOOKS), dtype=np.int16)).ready:
            pass
        for _ in range(WARM_UP_FRAMES):
            engine.step((0,), np.zeros((1, CODEBOOKS), dtype=np.int16))
        engine.close(0)
        return


def _threads_id(config: StageConfig) -> str:
    """On a CPU the threads split a product's sums, so their number is part of its bits."""
    return f"-threads{config.threads}" if torch.device(config.device).type == "cpu" else ""


def _codec_id(checkpoint: Checkpoint, config: StageConfig, group: int) -> str:
    kind = torch.device(config.device).type
    return f"mimi-{checkpoint.weights_hash[:16]}-{kind}-g{group}{_threads_id(config)}"


def _describe(
    stage: str, checkpoint: Checkpoint, config: StageConfig, numerics_id: str, started: float
) -> StageDescription:
    return StageDescription(
        stage=stage,
        checkpoint=checkpoint.name,
        trained=checkpoint.trained,
        slots=config.slots,
        device=config.device,
        numerics_id=numerics_id,
        receptive_frames=checkpoint.mimi_config.receptive_frames,
        load_s=time.monotonic() - started,
        memory_bytes=_memory_bytes(torch.device(config.device)),
    )


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    statm = Path("/proc/self/statm")  # not on macOS, where 0 says "not known"
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0

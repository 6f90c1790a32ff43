"""`personaplex talk` without a server: Ray on this machine, the three stage actors of one replica, one conversation."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from actors.errors import EngineLost, ServingError
from actors.interfaces import ReplicaSettings
from actors.replica import Replica
from actors.stage_build import StageConfig
from actors.stages_actor import ActorOptions, StageActors
from graphs.stages import Sampling, SessionSpec
from serving.catalog import Catalog
from serving.offline import Heard, answer_frames
from serving.pieces import load_pieces

# What a tie between three actors and two cores costs is time; asking Ray for whole cores would make it wait for ever.
NO_CORES = {"num_cpus": 0}


@dataclass(frozen=True)
class OfflineAnswer:
    heard: Heard
    checkpoint: str
    trained: bool
    notice: str
    voice: str


def answer_recording(
    checkpoint: str,
    frames: npt.NDArray[np.int16],
    spec: SessionSpec,
    *,
    sampling: Mapping[str, Any] | None = None,
    device: str = "auto",
    on_frame: Callable[[int], None] | None = None,
) -> OfflineAnswer:
    """Starts Ray and the actors, plays `frames` [n, 1920] int16 to the agent, and stops them again.

    An empty voice is the checkpoint's default. It is sampled as the checkpoint recommends, but for the fields of
    graphs.stages.Sampling that `sampling` names; what `spec` says of that is not read. Raises ServingError,
    CheckpointError, and ValueError for a voice or device that is not there, or a value that no step can draw from.
    """
    catalog = Catalog.read(checkpoint)
    spec = replace(spec, voice=pick_voice(catalog, spec.voice), sampling=pick_sampling(catalog, sampling or {}))
    config = StageConfig(checkpoint=checkpoint, slots=1, device=pick_device(device))
    # Niceness 0, or whatever else runs here goes first: Ray's own default is 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local",
        num_gpus=1 if config.device == "cuda" else 0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        heard = asyncio.run(_answer(config, frames, spec, on_frame))
    except RayTaskError as error:
        raise _told(error.cause) from error
    except RayError as error:
        raise _told(error) from error
    finally:
        ray.shutdown()
    return OfflineAnswer(heard, catalog.model, catalog.trained, catalog.notice, spec.voice)


def _told(error: BaseException) -> ServingError | ValueError:
    """An actor's own sentence, where it had one."""
    return error if isinstance(error, (ServingError, ValueError)) else EngineLost(f"An actor died: {error}")


def pick_voice(catalog: Catalog, name: str) -> str:
    """The voice asked for, or the default. Raises ValueError if there is none."""
    name = name or catalog.default_voice
    if not catalog.has_voice(name):
        known = ", ".join(catalog.voices) or "no voices at all"
        raise ValueError(f"there is no voice {name!r} in {catalog.model}; it has {known}")
    return name


def pick_sampling(catalog: Catalog, wished: Mapping[str, Any]) -> Sampling:
    """The checkpoint's own, but for the fields that are named. Raises ValueError for what no step can draw from."""
    sampling = replace(catalog.sampling, **wished)
    sampling.check()
    return sampling


def pick_device(name: str) -> str:
    """`auto` is CUDA where torch sees one. Raises ValueError for a device this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"{name!r} is no device; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device that torch can see")
    return name


async def _answer(
    config: StageConfig,
    frames: npt.NDArray[np.int16],
    spec: SessionSpec,
    on_frame: Callable[[int], None] | None,
) -> Heard:
    third = {"num_gpus": 0.3} if config.device == "cuda" else {}
    options = ActorOptions(encoder=NO_CORES | third, engine=NO_CORES | third, decoder=NO_CORES | third)
    stages = await StageActors.start(config, config, options)
    replica = Replica(
        stages.encoder,
        stages.converse,
        stages.decoder,
        slots=1,
        tokenizer=load_pieces(config.checkpoint),
        numerics_id=stages.numerics_id,
        settings=ReplicaSettings(window_s=0.0),  # nobody to wait for
    )
    loop = asyncio.create_task(replica.run())
    try:
        return await answer_frames(replica, frames, spec, on_frame)
    finally:
        await replica.stop()
        await loop
        stages.kill()

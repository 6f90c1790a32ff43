"""Settings with everything decided that depends on the machine where the application is built. Imports no Ray."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.stage_config import ANCHOR_S
from models.checkpoint_files import find_checkpoint
from serving.catalog import Catalog
from serving.router_config import reserve_by_size, router_config
from serving.routing import RouterConfig
from serving.settings import ServeSettings
from serving.trunk_server import TrunkConfig

# Ray refuses to place what asks for nothing; these small shares let eight processes of a laptop's two cores start.
PROCESS_CPUS = 0.1
STAGES = 3
CPU_SLOTS = 4  # what one core does in half of its time: docs/performance
# What torch sees of it, which is a little less than on the box; for a head node without a GPU of its own.
ACCELERATOR_BYTES = {"H100": 79 << 30, "H200": 139 << 30}
ENGINE_GPU_SHARE, CODEC_GPU_SHARE = 0.6, 0.2


class PlanError(ValueError):
    """Settings that this machine, or the one they are for, cannot serve. Its sentence is for the operator."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every process of the application is told. `device` is "cpu" or "cuda", `accelerator` a name or None."""

    settings: ServeSettings
    catalog: Catalog
    device: str
    accelerator: str | None
    trunk: TrunkConfig
    folder: Path  # of the checkpoint on the machine that built the application

    @property
    def slots(self) -> int:
        """Conversations a replica holds; make_plan has counted them where the settings leave it open."""
        return CPU_SLOTS if self.settings.slots == "auto" else self.settings.slots

    @property
    def router(self) -> RouterConfig:
        return router_config(self.settings)

    @property
    def reserve_slots(self) -> int:
        """Slots kept for conversations whose replica dies, if all replicas are as large as those started here."""
        if self.settings.reserve_slots == "auto":
            return self.slots if reserve_by_size(self.settings) else 0
        return self.settings.reserve_slots

    @property
    def nearest_checkpoint(self) -> str:
        """The checkpoint's folder where this machine has it, which spares a process torch and a look at the hub;
        else what the settings say."""
        return str(self.folder) if self.folder.is_dir() else self.settings.checkpoint

    @property
    def window_s(self) -> float:
        """How long a first frame waits for company, out of its 80 ms."""
        if self.settings.batch_window_s is not None:
            return self.settings.batch_window_s
        return 0.004 if self.device == "cuda" else 0.015

    def bundle(self) -> dict[str, float]:
        """What one replica asks Ray for: all on one node, and on a GPU machine all on one GPU."""
        bundle = {"CPU": PROCESS_CPUS * (1 + STAGES)}
        if self.device == "cuda":
            bundle["GPU"] = 1.0
            if self.accelerator is not None:
                bundle[f"accelerator_type:{self.accelerator}"] = 0.001
        elif self.accelerator is not None:
            bundle[self.accelerator] = 1.0  # a custom resource of that name: clusters that are simulated on CPUs
        return bundle

    def engine_options(self) -> dict[str, Any]:
        """Ray's options for the engine actor; its share and those of the two codec actors make up the bundle."""
        return self._options(ENGINE_GPU_SHARE)

    def codec_options(self) -> dict[str, Any]:
        return self._options(CODEC_GPU_SHARE)

    def _options(self, gpu_share: float) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": PROCESS_CPUS}
        if self.device == "cuda":
            options["num_gpus"] = gpu_share
        return options


def slots_of(settings: ServeSettings, accelerator: str) -> int:
    """What fits into a replica's GPU: the one in this machine, or else one of the accelerator's name.

    Raises PlanError if neither says how much memory that is, or if it is too little.
    """
    import torch

    from graphs.anchors import AnchorPolicy
    from graphs.backends import Backends
    from graphs.memory_plan import memory_plan
    from models.checkpoint import load_checkpoint

    memory = ACCELERATOR_BYTES.get(accelerator)
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    if memory is None:
        known = ", ".join(ACCELERATOR_BYTES)
        raise PlanError(
            f"slots are `auto`, but there is no GPU here and nothing is known of {accelerator!r} (only of {known}): "
            "say how many with --slots"
        )
    loaded = load_checkpoint(settings.checkpoint, parts=frozenset())
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    parts = memory_plan(loaded.lm_config, loaded.mimi_config, dtype, Backends(kv_dtype=settings.kv_dtype))
    try:
        return parts.slots(memory, AnchorPolicy.of_seconds(ANCHOR_S), settings.kv_overcommit)
    except ValueError as error:
        raise PlanError(str(error)) from error


def make_plan(settings: ServeSettings) -> Plan:
    """Decide what `auto` means on this machine, and read what the checkpoint offers.

    Raises models.checkpoint.CheckpointError; PlanError if settings and device do not go together.
    """
    device = settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = settings.accelerator
    if wanted == "auto":
        wanted = "H100" if device == "cuda" else "none"
    if settings.kv_dtype == "fp8" and device != "cuda":
        raise PlanError("keys and values in fp8 are for CUDA: leave --kv-dtype out, or choose bfloat16")
    if settings.slots == "auto" and device == "cuda":
        settings = settings.model_copy(update={"slots": slots_of(settings, wanted)})
    secret = settings.trunk_secret or secrets.token_urlsafe(32)
    return Plan(
        settings,
        Catalog.read(settings.checkpoint),
        device,
        None if wanted == "none" else wanted,
        TrunkConfig(secret, settings.trunk_ping_s, settings.trunk_dead_s),
        find_checkpoint(settings.checkpoint).folder,
    )

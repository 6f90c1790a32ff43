"""Settings with everything decided that depends on the machine where the application is built. Imports no Ray."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint_files import find_checkpoint
from serving.catalog import Catalog
from serving.routing import RouterConfig
from serving.settings import ServeSettings
from serving.trunk_server import TrunkConfig

# Ray refuses to place what asks for nothing; these small shares let eight processes of a laptop's two cores start.
PROCESS_CPUS = 0.1
STAGES = 3
ENGINE_GPU_SHARE, CODEC_GPU_SHARE = 0.6, 0.2


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
    def router(self) -> RouterConfig:
        settings = self.settings
        return RouterConfig(
            settings.lease_s,
            settings.max_waiting,
            reserve_slots=None if self.reserve_by_size else self.reserve_slots,
            rebuilds_at_once=settings.rebuilds_at_once,
            settle_s=2 * settings.report_interval_s,
        )

    @property
    def reserve_by_size(self) -> bool:
        """Whether the reserve is as large as the largest replica. Where there will only ever be one replica, no other
        can stand in for it."""
        return self.settings.reserve_slots == "auto" and self.settings.max_replicas > 1

    @property
    def reserve_slots(self) -> int:
        """Slots kept for conversations whose replica dies, if all replicas are as large as those started here."""
        if self.settings.reserve_slots == "auto":
            return self.settings.slots if self.reserve_by_size else 0
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


def make_plan(settings: ServeSettings) -> Plan:
    """Decide what `auto` means on this machine, and read what the checkpoint offers.

    Raises models.checkpoint.CheckpointError.
    """
    device = settings.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = settings.accelerator
    if wanted == "auto":
        wanted = "H100" if device == "cuda" else "none"
    secret = settings.trunk_secret or secrets.token_urlsafe(32)
    return Plan(
        settings,
        Catalog.read(settings.checkpoint),
        device,
        None if wanted == "none" else wanted,
        TrunkConfig(secret, settings.trunk_ping_s, settings.trunk_dead_s),
        find_checkpoint(settings.checkpoint).folder,
    )

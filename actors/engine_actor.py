"""The language model's stage as a Ray actor: nothing but a shell around actors.converse_stage.EngineStage."""

from __future__ import annotations

import ray

from actors.stage_config import StageConfig, StageDescription
from actors.stage_shell import StageShell
from graphs.stages import ConverseReply, ConverseStage, Past, PromptInfo, SessionSpec, StageBatch


class EngineShell(StageShell[ConverseStage]):
    def __init__(self, config: StageConfig) -> None:
        def build() -> tuple[ConverseStage, StageDescription]:
            from actors.stage_build import build_engine

            return build_engine(config)

        super().__init__(config, build)

    @ray.method
    def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> PromptInfo:
        return self._stage.open(session, epoch, slot, spec, past, tenant)

    @ray.method
    def step(self, batch: StageBatch) -> ConverseReply:
        return self._stage.step(batch)


EngineActor = ray.remote(EngineShell)

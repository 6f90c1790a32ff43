"""The language model's stage as a Ray actor: nothing but a shell around actors.converse_stage.EngineStage."""

from __future__ import annotations

import ray

from actors.stage_build import StageConfig, StageDescription, build_engine, with_memory
from graphs.stages import ConverseReply, PromptInfo, SessionSpec, StageBatch


class EngineShell:
    """Synchronous: one call at a time, in the order its one caller made them."""

    def __init__(self, config: StageConfig) -> None:
        self._stage, self._description = build_engine(config)

    @ray.method
    def describe(self) -> StageDescription:
        return with_memory(self._description)

    @ray.method
    def open(self, session: str, epoch: int, slot: int, spec: SessionSpec) -> PromptInfo:
        return self._stage.open(session, epoch, slot, spec)

    @ray.method
    def step(self, batch: StageBatch) -> ConverseReply:
        return self._stage.step(batch)

    @ray.method
    def close(self, session: str, epoch: int) -> None:
        self._stage.close(session, epoch)


EngineActor = ray.remote(EngineShell)

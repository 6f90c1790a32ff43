"""The language model's stage as a Ray actor: nothing but a shell around actors.converse_stage.EngineStage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from actors.gently import gently
from actors.promptly import promptly
from actors.stage_config import StageConfig, StageDescription
from actors.stage_link import StageServer
from graphs.stages import ConverseReply, Past, PromptInfo, SessionSpec, StageBatch

if TYPE_CHECKING:
    from actors.converse_stage import EngineStage


class EngineShell:
    """Synchronous: one call at a time, in the order its one caller made them."""

    def __init__(self, config: StageConfig) -> None:
        def build() -> tuple[EngineStage, StageDescription]:
            # Here and not above: torch is seconds of start-up that the process which starts the actors does not need.
            from actors.stage_build import build_engine

            return build_engine(config)

        self._stage, self._description = gently(build)
        from actors.stage_build import use_threads

        use_threads(config)  # it counts for the thread that says so, and this is the one that works

    @ray.method
    def listen(self) -> str:
        """Where its replica may connect, once (actors.stage_link)."""
        self._server = StageServer(self)
        return self._server.address

    @ray.method
    def serve(self) -> None:
        """Answers whoever has connected until it has gone; no other call of this actor is answered meanwhile."""
        promptly()
        self._server.serve()

    @ray.method
    def describe(self) -> StageDescription:
        from actors.stage_build import with_memory

        return with_memory(self._description)

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

    @ray.method
    def close(self, session: str, epoch: int) -> None:
        self._stage.close(session, epoch)

    @ray.method
    def clear(self) -> None:
        self._stage.clear()


EngineActor = ray.remote(EngineShell)

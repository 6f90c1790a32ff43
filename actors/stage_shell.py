"""What the stages' Ray actors have in common: a stage that is built gently, and its calls by way of Ray or a socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import ray

from actors.gently import gently
from actors.promptly import promptly
from actors.stage_config import StageConfig, StageDescription
from actors.stage_link import StageServer
from graphs.stages import CodecPast, CodecStage, ConverseStage, RebuildReply, StageBatch, StageReply

StageT = TypeVar("StageT", bound=CodecStage | ConverseStage)


class StageShell(Generic[StageT]):
    """Synchronous: one call at a time, in the order its one caller made them. That order is what lets a close
    follow the step it races with. Ray names the process after the class that was made of this one."""

    def __init__(self, config: StageConfig, build: Callable[[], tuple[StageT, StageDescription]]) -> None:
        """build: imports what it needs by itself. Torch is seconds of start-up that the process which starts the actors
        does not need, and they pass on a thread that yields."""
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
        promptly(spins=not self._description.device.startswith("cpu"))
        self._server.serve()

    @ray.method
    def describe(self) -> StageDescription:
        from actors.stage_build import with_memory

        return with_memory(self._description)

    @ray.method
    def close(self, session: str, epoch: int) -> None:
        self._stage.close(session, epoch)

    @ray.method
    def clear(self) -> None:
        self._stage.clear()


class CodecShell(StageShell[CodecStage]):
    """The encoder's calls, which are the decoder's as well."""

    @ray.method
    def open(self, session: str, epoch: int, slot: int, past: CodecPast | None = None) -> bool:
        return self._stage.open(session, epoch, slot, past)

    @ray.method
    def step(self, batch: StageBatch) -> StageReply:
        return self._stage.step(batch)

    @ray.method
    def rebuild(self, budget_s: float) -> RebuildReply:
        return self._stage.rebuild(budget_s)

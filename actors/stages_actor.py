"""The three stage actors of a replica: started together, spoken to as the handles a Replica takes, killed together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayTaskError

from actors.decoder_actor import DecoderActor, DecoderShell
from actors.encoder_actor import EncoderActor, EncoderShell
from actors.engine_actor import EngineActor, EngineShell
from actors.errors import ServingError
from actors.stage_config import StageConfig, StageDescription, combined_numerics_id
from graphs.stages import ConverseReply, Past, PromptInfo, SessionSpec, StageBatch, StageReply

T = TypeVar("T")

# A restarted actor would answer with the state of no conversation; a retried step, with one frame too many.
NO_SECOND_LIFE = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """Ray's options (num_cpus, num_gpus, scheduling_strategy, runtime_env, …) for each of the three."""

    encoder: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    engine: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})
    decoder: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 1})


async def answer(ref: Awaitable[T]) -> T:
    """What an actor's method returned. Its ServingErrors are raised as they were, without Ray's wrapping; any other
    exception means that the actor, or what it held, is not to be trusted any more."""
    try:
        return await ref
    except RayTaskError as error:
        if isinstance(error.cause, ServingError):
            raise error.cause from None
        raise


class CodecRemote:
    """An encoder or decoder actor as actors.interfaces.CodecHandle."""

    def __init__(self, actor: ActorProxy[EncoderShell] | ActorProxy[DecoderShell]) -> None:
        self.actor = actor

    async def open(self, session: str, epoch: int, slot: int) -> None:
        await answer(self.actor.open.remote(session, epoch, slot))

    async def step(self, batch: StageBatch) -> StageReply:
        return await answer(self.actor.step.remote(batch))

    async def close(self, session: str, epoch: int) -> None:
        await answer(self.actor.close.remote(session, epoch))

    async def describe(self) -> StageDescription:
        return await answer(self.actor.describe.remote())


class ConverseRemote:
    """An engine actor as actors.interfaces.ConverseHandle."""

    def __init__(self, actor: ActorProxy[EngineShell]) -> None:
        self.actor = actor

    async def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> PromptInfo:
        # Ray's types know a method's parameters up to the first that has a default.
        return await answer(self.actor.open.remote(session, epoch, slot, spec, past, tenant))  # type: ignore[call-arg]

    async def step(self, batch: StageBatch) -> ConverseReply:
        return await answer(self.actor.step.remote(batch))

    async def close(self, session: str, epoch: int) -> None:
        await answer(self.actor.close.remote(session, epoch))

    async def describe(self) -> StageDescription:
        return await answer(self.actor.describe.remote())


class StageActors:
    """Made by `start`. Whoever made it kills it: the actors live no longer than the process that started them, but
    may well outlive its use of them."""

    def __init__(self, encoder: CodecRemote, converse: ConverseRemote, decoder: CodecRemote):
        self.encoder, self.converse, self.decoder = encoder, converse, decoder
        self.descriptions: list[StageDescription] = []  # encoder, engine, decoder

    @staticmethod
    async def start(
        codec: StageConfig, engine: StageConfig, options: ActorOptions | None = None, timeout_s: float = 600.0
    ) -> StageActors:
        """Starts the three and returns when all are loaded and warm; if one does not come up, none is left.

        `timeout_s` bounds waiting for their resources and loading 17 GB together. Raises TimeoutError, or Ray's
        error that holds the actor's own (a CheckpointError, for one).
        """
        chosen = options or ActorOptions()
        stages = StageActors(
            CodecRemote(EncoderActor.options(**{**chosen.encoder, **NO_SECOND_LIFE}).remote(codec)),
            ConverseRemote(EngineActor.options(**{**chosen.engine, **NO_SECOND_LIFE}).remote(engine)),
            CodecRemote(DecoderActor.options(**{**chosen.decoder, **NO_SECOND_LIFE}).remote(codec)),
        )
        up = [asyncio.create_task(stage.describe()) for stage in (stages.encoder, stages.converse, stages.decoder)]
        try:
            async with asyncio.timeout(timeout_s):
                stages.descriptions = list(await asyncio.gather(*up))
        except BaseException:
            stages.kill()
            for task in up:
                task.cancel()
            await asyncio.gather(*up, return_exceptions=True)
            raise
        return stages

    @property
    def numerics_id(self) -> str:
        """Replicas of equal id compute equal bits."""
        return combined_numerics_id(self.descriptions)

    def kill(self) -> None:
        """Ends all three at once; killing what is dead is no error."""
        for actor in (self.encoder.actor, self.converse.actor, self.decoder.actor):
            assert isinstance(actor, ActorHandle)  # said to the type checker, for which a handle is its class as well
            ray.kill(actor)

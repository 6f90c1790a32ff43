"""The three stage actors of a replica: started together, spoken to as the handles a Replica takes, killed together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayError, RayTaskError

from actors.decoder_actor import DecoderActor, DecoderShell
from actors.encoder_actor import EncoderActor, EncoderShell
from actors.engine_actor import EngineActor, EngineShell
from actors.errors import ServingError
from actors.stage_config import StageConfig, StageDescription, combined_numerics_id
from actors.stage_link import StageGone, StageLink
from graphs.stages import (
    CodecPast,
    ConverseReply,
    Past,
    PromptInfo,
    RebuildReply,
    SessionSpec,
    StageBatch,
    StageReply,
)

T = TypeVar("T")
log = logging.getLogger(__name__)

# A restarted actor would answer with the state of no conversation; a retried step, with one frame too many.
NO_SECOND_LIFE = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
ANSWERS_WITHIN_S = 2.0  # a stage that takes longer to let go of everything is not worth keeping


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


class _Remote:
    """An actor and, once `connect` has been awaited, the socket that its calls take (actors.stage_link)."""

    def __init__(self, actor: ActorProxy[EncoderShell] | ActorProxy[EngineShell] | ActorProxy[DecoderShell]) -> None:
        self.actor = actor
        self._link: StageLink | None = None
        self._serving: object = None

    async def connect(self) -> None:
        """Frames do not pass Ray from now on, if the actor is on this node. Twice is once."""
        if self._link is not None:
            return
        address = await answer(self.actor.listen.remote())
        try:
            self._link = await StageLink.to(address)
        except OSError as error:
            log.info("a stage is not on this node, and is called by way of Ray: %s", error)
            return
        self._serving = self.actor.serve.remote()  # it ends with the connection

    async def describe(self) -> StageDescription:
        description: StageDescription = await self._call("describe")
        return description

    async def close(self, session: str, epoch: int) -> None:
        await self._call("close", session, epoch)

    async def clear(self) -> None:
        await self._call("clear")

    def kill(self) -> None:
        """Ends the actor at once; whoever waits for an answer is told that it is gone. Twice is once."""
        if self._link is not None:
            self._link.close()
        assert isinstance(self.actor, ActorHandle)  # said to the type checker, for which a handle is its class as well
        ray.kill(self.actor)

    def hurry(self) -> None:
        """A frame waits for what the stage is at. By way of Ray nothing is known of its thread, and it goes first
        always."""
        if self._link is not None:
            self._link.hurry()

    async def _call(self, method: str, *arguments: object, behind: bool = False) -> Any:
        if self._link is not None:
            return await self._link.call(method, *arguments, behind=behind)
        return await answer(getattr(self.actor, method).remote(*arguments))


class CodecRemote(_Remote):
    """An encoder or decoder actor as actors.interfaces.CodecHandle."""

    async def open(self, session: str, epoch: int, slot: int, past: CodecPast | None = None) -> bool:
        exact: bool = await self._call("open", session, epoch, slot, past)
        return exact

    async def step(self, batch: StageBatch) -> StageReply:
        reply: StageReply = await self._call("step", batch)
        return reply

    async def rebuild(self, budget_s: float, *, behind: bool) -> RebuildReply:
        reply: RebuildReply = await self._call("rebuild", budget_s, behind=behind)
        return reply


class ConverseRemote(_Remote):
    """An engine actor as actors.interfaces.ConverseHandle."""

    async def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> PromptInfo:
        prompt: PromptInfo = await self._call("open", session, epoch, slot, spec, past, tenant)
        return prompt

    async def step(self, batch: StageBatch) -> ConverseReply:
        reply: ConverseReply = await self._call("step", batch, behind=len(batch.data) == 0)
        return reply


class StageActors:
    """Made by `start`. Whoever made it kills it: the actors live no longer than the process that started them, but
    may well outlive its use of them."""

    def __init__(self, codec: StageConfig, engine: StageConfig, options: ActorOptions) -> None:
        self._codec, self._engine, self._options = codec, engine, options
        self.encoder, self.converse, self.decoder = self._new_encoder(), self._new_engine(), self._new_decoder()
        self.descriptions: list[StageDescription] = []  # encoder, engine, decoder

    @staticmethod
    async def start(
        codec: StageConfig, engine: StageConfig, options: ActorOptions | None = None, timeout_s: float = 600.0
    ) -> StageActors:
        """Starts the three and returns when all are loaded and warm; if one does not come up, none is left.

        `timeout_s` bounds waiting for their resources and loading 17 GB together. Raises TimeoutError, or Ray's
        error that holds the actor's own (a CheckpointError, for one).
        """
        stages = StageActors(codec, engine, options or ActorOptions())
        await stages._up(timeout_s)
        return stages

    async def repair(self, failed: str | None, timeout_s: float = 600.0) -> None:
        """Replaces the stage that `failed` (all, where that is not known) and those that do not answer any more; the
        others, which need not load anything, forget the conversations that are lost. If one does not come up, none is
        left, and it raises what `start` does."""
        alive = await asyncio.gather(*(self._cleared(stage) for stage in (self.encoder, self.converse, self.decoder)))
        for name, well in zip(("encoder", "engine", "decoder"), alive, strict=True):
            if well and failed not in (None, name):
                continue
            if name == "encoder":
                self.encoder.kill()
                self.encoder = self._new_encoder()
            elif name == "engine":
                self.converse.kill()
                self.converse = self._new_engine()
            else:
                self.decoder.kill()
                self.decoder = self._new_decoder()
        before = self.numerics_id
        await self._up(timeout_s)
        if self.numerics_id != before:
            self.kill()
            raise RuntimeError(f"the stages compute otherwise than before: {self.numerics_id}, not {before}")

    @property
    def numerics_id(self) -> str:
        """Replicas of equal id compute equal bits."""
        return combined_numerics_id(self.descriptions)

    def kill(self) -> None:
        """Ends all three at once; killing what is dead is no error."""
        for stage in (self.encoder, self.converse, self.decoder):
            stage.kill()

    def _new_encoder(self) -> CodecRemote:
        return CodecRemote(EncoderActor.options(**{**self._options.encoder, **NO_SECOND_LIFE}).remote(self._codec))

    def _new_engine(self) -> ConverseRemote:
        return ConverseRemote(EngineActor.options(**{**self._options.engine, **NO_SECOND_LIFE}).remote(self._engine))

    def _new_decoder(self) -> CodecRemote:
        return CodecRemote(DecoderActor.options(**{**self._options.decoder, **NO_SECOND_LIFE}).remote(self._codec))

    async def _up(self, timeout_s: float) -> None:
        """Waits until all three are loaded and warm; if one is not, kills all and raises."""
        stages = (self.encoder, self.converse, self.decoder)
        up = [asyncio.create_task(stage.describe()) for stage in stages]
        try:
            async with asyncio.timeout(timeout_s):
                self.descriptions = list(await asyncio.gather(*up))
                await asyncio.gather(*(stage.connect() for stage in stages))
        except BaseException:
            self.kill()
            for task in up:
                task.cancel()
            await asyncio.gather(*up, return_exceptions=True)
            raise

    async def _cleared(self, stage: CodecRemote | ConverseRemote) -> bool:
        """Whether a stage lives and has let go of everything."""
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                await stage.clear()
        except (RayError, StageGone, TimeoutError):
            return False
        return True

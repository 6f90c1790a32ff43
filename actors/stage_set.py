"""The three stages of a replica as one thing: opened together, closed together, and dead together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple, ParamSpec, TypeVar

from actors.errors import EngineLost, ServingError
from actors.interfaces import Clock, CodecHandle, ConverseHandle
from graphs.stages import CodecPast, Past, PromptInfo, SessionSpec

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Pasts(NamedTuple):
    """What each of them is told of a conversation that was held elsewhere."""

    engine: Past
    encoder: CodecPast
    decoder: CodecPast


class StageSet:
    """`on_fault` is called with the fault when the first of them fails."""

    def __init__(
        self,
        encoder: CodecHandle,
        converse: ConverseHandle,
        decoder: CodecHandle,
        clock: Clock,
        timeout_s: float,
        on_fault: Callable[[EngineLost], None],
    ) -> None:
        self.encoder, self.converse, self.decoder = encoder, converse, decoder
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_fault = on_fault
        self._lives = 1  # calls of an earlier life that fail late say nothing about this one
        self.fault: EngineLost | None = None
        self.failed: str | None = None  # the stage that failed first, as far as it is known

    def replace(self, encoder: CodecHandle, converse: ConverseHandle, decoder: CodecHandle) -> None:
        """Begins a new life with stages that hold nothing."""
        self.encoder, self.converse, self.decoder = encoder, converse, decoder
        self._lives += 1
        self.fault = self.failed = None

    async def call(self, stage: str, method: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """One call of a stage. A ServingError is its answer; any other exception, or silence, is its death and
        becomes EngineLost."""
        life = self._lives
        try:
            return await self._clock.wait_for(method(*args, **kwargs), self._timeout_s)
        except ServingError:
            raise
        except Exception as error:
            if life != self._lives:
                raise EngineLost(f"The {stage} of this replica failed.") from error
            raise self.fail(stage, error) from error

    async def open(
        self, session: str, epoch: int, slot: int, spec: SessionSpec, tenant: str, pasts: Pasts | None = None
    ) -> tuple[PromptInfo, bool]:
        """Opens all three and returns when all three have answered: with the prompt, and whether the codecs' pasts
        were all that their streams depend on. Raises the first refusal in this order."""
        past = pasts or (None, None, None)
        prompt, *streams = await asyncio.gather(
            self.call("engine", self.converse.open, session, epoch, slot, spec, past[0], tenant),
            self.call("encoder", self.encoder.open, session, epoch, slot, past[1]),
            self.call("decoder", self.decoder.open, session, epoch, slot, past[2]),
            return_exceptions=True,
        )
        for result in (prompt, *streams):
            if isinstance(result, BaseException):
                raise result
        assert not isinstance(prompt, BaseException)  # said to the type checker; the loop has seen to it
        return prompt, all(exact is True for exact in streams)

    async def close(self, session: str, epoch: int) -> None:
        """Closes all three. A stage that cannot close has failed: a slot of unknown state must not find another
        owner. Raises nothing; after a fault there is nothing to close."""
        if self.fault is not None:
            return
        results = await asyncio.gather(
            self.call("encoder", self.encoder.close, session, epoch),
            self.call("engine", self.converse.close, session, epoch),
            self.call("decoder", self.decoder.close, session, epoch),
            return_exceptions=True,
        )
        for error in results:
            if isinstance(error, Exception) and not isinstance(error, EngineLost):  # `call` has noted those
                self.fail("close", error)

    def fail(self, where: str, error: BaseException) -> EngineLost:
        """Notes a fault; only the first counts. Returns the one in force."""
        if self.fault is None:
            log.error("the %s failed, every conversation here is lost", where, exc_info=error)
            self.fault = EngineLost(f"The {where} of this replica failed.")
            self.failed = where if where in ("encoder", "engine", "decoder") else None
            self._on_fault(self.fault)
        return self.fault

"""What a replica is given: stages somewhere else, a clock, metrics, a tokenizer, settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from actors.journal import RECEPTIVE_S
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


class Clock(Protocol):
    """Monotonic seconds, and the one way the replica waits: tests put a clock of their own in its place."""

    def now(self) -> float: ...

    async def wait_for(self, what: Awaitable[T], timeout_s: float) -> T:
        """The result of `what`; raises TimeoutError, and cancels it, after `timeout_s`."""
        ...


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    async def wait_for(self, what: Awaitable[T], timeout_s: float) -> T:
        async with asyncio.timeout(timeout_s):
            return await what


class CodecHandle(Protocol):
    """A graphs.stages.CodecStage somewhere else: the same calls, answered later. An exception that is no
    ServingError means that the stage, with the state of all its conversations, is gone."""

    def open(self, session: str, epoch: int, slot: int, past: CodecPast | None = None) -> Awaitable[bool]: ...

    def step(self, batch: StageBatch) -> Awaitable[StageReply]: ...

    def rebuild(self, budget_s: float, *, behind: bool) -> Awaitable[RebuildReply]:
        """behind: it goes behind frames, as no frame waits for it, until `hurry`."""
        ...

    def close(self, session: str, epoch: int) -> Awaitable[None]: ...

    def hurry(self) -> None:
        """A frame waits for what it is at: see actors.precedence."""
        ...


class ConverseHandle(Protocol):
    """A graphs.stages.ConverseStage somewhere else."""

    def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> Awaitable[PromptInfo]: ...

    def step(self, batch: StageBatch) -> Awaitable[ConverseReply]: ...

    def close(self, session: str, epoch: int) -> Awaitable[None]: ...

    def hurry(self) -> None:
        """As a CodecHandle's."""
        ...


class FrameMetrics(Protocol):
    """What a replica tells about its frames; the trunk's process turns it into histograms."""

    def observe_frame_ms(self, frame_ms: float) -> None:
        """From a frame's arrival to its answer."""
        ...

    def deadline_miss(self, slot: int) -> None: ...

    def batch_size(self, stage: str, frames: int) -> None: ...


class NoMetrics:
    def observe_frame_ms(self, frame_ms: float) -> None:
        return None

    def deadline_miss(self, slot: int) -> None:
        return None

    def batch_size(self, stage: str, frames: int) -> None:
        return None


class Pieces(Protocol):
    """The part of a text tokenizer that a replica needs."""

    def piece(self, token_id: int) -> str: ...


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    window_s: float = 0.004  # how long a first frame waits for company: 4 ms on a GPU, 15 ms on a CPU
    early_frames: int = 5  # frames a conversation may have waiting before it is ready
    frames_in_flight: int = 25  # and afterwards: 2 s, as much as the gates can replay
    stage_timeout_s: float = 20.0  # a call that takes longer is a death; a first step may still warm up a GPU
    receptive_s: float = RECEPTIVE_S  # of PCM and codes kept in each journal
    # What a codec may work on a rebuild at a time, out of the 80 ms of the frames that wait behind it: a tenth, as what
    # the engine reads beside frames or between them (graphs.prefill_budget) ...
    rebuild_live_s: float = 0.008
    rebuild_idle_s: float = 0.25  # ... and where no frames can wait
    resume_grace_s: float = 30.0  # how long a slot without a trunk waits for its client's resume token
    move_every_s: float = 1.0  # how often an ingress is asked again to take a conversation elsewhere

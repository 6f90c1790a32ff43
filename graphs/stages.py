"""The three stages a frame passes (encode → converse → decode) as typed protocols, and what they exchange.

A stage is called with one batch at a time and answers every entry of it. It numbers frames per conversation
and is idempotent: a frame it has done is answered from its replay buffer, the next one is done, a later one
is refused with the number it needs. That, and the epoch, is what makes a retry after a fault safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from models.config import Sampling as Sampling  # part of what stages exchange; its defaults are the checkpoint's

Pcm = npt.NDArray[np.int16]
Codes = npt.NDArray[np.int16]


class FrameKey(NamedTuple):
    """Names one 80 ms frame of one conversation under one ownership.

    `epoch` grows each time the conversation changes hands; only the router raises it. `frame` counts from 0
    at the first frame after the prompt.
    """

    session: str
    epoch: int
    frame: int


class Verdict(IntEnum):
    """What a stage did with one entry of a batch."""

    DONE = 0  # computed now
    REPLAYED = 1  # had been computed before, answered from the replay buffer
    NEED = 2  # an earlier frame is missing: `detail` is the frame the stage waits for
    STALE = 3  # the entry's epoch is over: `detail` is the epoch in force
    UNKNOWN = 4  # no such conversation here
    FAILED = 5  # this conversation's state is broken (bad input); the others are untouched


class StageBatch(NamedTuple):
    """One call of a stage. `data` is [n, ...], row i belongs to `keys[i]`; a session appears at most once."""

    keys: tuple[FrameKey, ...]
    data: npt.NDArray[np.int16]


class StageReply(NamedTuple):
    """The answer, entry by entry, in the order of the batch."""

    keys: tuple[FrameKey, ...]
    verdicts: tuple[Verdict, ...]
    details: tuple[int, ...]  # see Verdict.NEED and Verdict.STALE, else 0
    data: npt.NDArray[np.int16]  # rows of refused entries are zero


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """All that determines a conversation beside what its user says. Same spec, same audio, same tokens."""

    voice: str  # a name from the checkpoint's voices
    role: str  # the text prompt, without its <system> wrapping; may be empty
    seed: int  # 0 … 2**63 - 1, drawn by the server where the client gave none
    sampling: Sampling = field(default_factory=Sampling)
    # The role as tokens, where the caller has them and the checkpoint no tokenizer (parity); then `role` is not read.
    role_tokens: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """What a conversation has been through, from its journal: enough to go on as if nothing had happened.

    rows: [n, 17] int16, what the model read in frames first_row … first_row + n - 1: all of them (first_row 0), or
    those that followed the prompt at the last anchor and all since.
    pending: [17] int16, the column of the next frame as far as it is known (-2 elsewhere). Without it the last row is
    run as a live one, which draws the same tokens again, and user_before, [8] int16, must be its frame's user codes.
    """

    rows: npt.NDArray[np.int16]
    first_row: int = 0
    pending: npt.NDArray[np.int16] | None = None
    user_before: Codes | None = None

    @property
    def next_frame(self) -> int:
        return self.first_row + len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class CodecPast:
    """What a codec stage has been given in frames next_frame - m … next_frame - 1, from a journal: PCM [m, 1920] int16
    for an encoder, codes [m, 8] int16 for a decoder."""

    rows: npt.NDArray[np.int16]
    next_frame: int

    @property
    def first_frame(self) -> int:
        return self.next_frame - len(self.rows)


class RebuildReply(NamedTuple):
    """What a codec stage has got done of its rebuilds.

    `ready` names conversations whose state stands where it stood, `pending` counts those that are not there yet.
    """

    ready: tuple[tuple[str, int], ...]  # (session, epoch)
    pending: int


class PromptInfo(NamedTuple):
    """What a conversation starts from: the frames of its prompt, and a hash of all that went into them."""

    frames: int
    digest: str


class MemoryReport(NamedTuple):
    """What an engine that promises more KV cache than it has says about it (graphs.kv_pressure); (session, epoch) each.

    room: conversations that may still be opened. pressure: "" or "migrate one": then those in `migrate` are to be moved
    to other replicas, the first one first, within seconds_left, or the engine will park the youngest. parked: those
    that are: their frames are answered NEED with their own number until `ready` names them again.
    """

    room: int
    pressure: str
    migrate: tuple[tuple[str, int], ...]
    parked: tuple[tuple[str, int], ...]
    seconds_left: float
    pages: int
    free_pages: int


class ConverseReply(NamedTuple):
    """What one frame step gave.

    `frames.data` is [n, 9] int16: the text token and the agent's 8 codes of that very frame (codebooks 1-7
    are de-delayed). `journal` is [n, 17] int16: the raw input column the step ran on; `next_columns` [n, 17] int16
    the column it began, -2 where the next frame will tell; `first_rows` [n] int32 the oldest frame whose column a
    rebuild needs, which is 0 until the first anchor.
    `ready` names conversations whose prompt finished in this step. `pending` counts prompts still to prefill,
    so the caller knows to call again even when no frame waits. `memory`: None where every slot has its full
    context, and in replies between two looks at it.
    """

    frames: StageReply
    journal: npt.NDArray[np.int16]
    ready: tuple[tuple[str, int], ...]  # (session, epoch)
    failed: tuple[tuple[str, int, str], ...]  # (session, epoch, reason): prompts that could not be built
    pending: int
    next_columns: npt.NDArray[np.int16]
    first_rows: npt.NDArray[np.int32]
    memory: MemoryReport | None = None


class CodecStage(Protocol):
    """Mimi encode (PCM [n, 1920] → codes [n, 8]) or decode (codes [n, 8] → PCM [n, 1920])."""

    def open(self, session: str, epoch: int, slot: int, past: CodecPast | None = None) -> bool:
        """Whether what follows `past` will be what would have followed it elsewhere, bit for bit."""
        ...

    def step(self, batch: StageBatch) -> StageReply: ...

    def rebuild(self, budget_s: float) -> RebuildReply:
        """Works on what `past`s have left to do, for about `budget_s`: frames wait behind this call."""
        ...

    def close(self, session: str, epoch: int) -> None: ...

    def clear(self) -> None:
        """Closes whatever is open."""
        ...


class ConverseStage(Protocol):
    """The language model: user codes [n, 8] in, agent tokens [n, 9] out. An empty batch only prefills."""

    def open(
        self,
        session: str,
        epoch: int,
        slot: int,
        spec: SessionSpec,
        past: Past | None = None,
        tenant: str | None = None,
    ) -> PromptInfo: ...

    def step(self, batch: StageBatch) -> ConverseReply: ...

    def close(self, session: str, epoch: int) -> None: ...

    def clear(self) -> None:
        """Closes whatever is open."""
        ...

"""What travels between ingress, replica and router: plain frozen data, and the numbers that guard it.

Every message names (session, epoch, frame); see graphs.stages.FrameKey for what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from graphs.stages import Codes, FrameKey, Pcm, SessionSpec


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """Ask a replica for a slot. `tenant` is who pays, `ingress` who will carry the frames."""

    session: str
    epoch: int
    tenant: str
    ingress: str
    spec: SessionSpec


@dataclass(frozen=True, slots=True)
class FrameIn:
    """80 ms of the user: PCM [1920] int16 at 24 kHz mono."""

    key: FrameKey
    pcm: Pcm


@dataclass(frozen=True, slots=True)
class CloseRequest:
    session: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The prompt is in the KV cache: frames are welcome from now on."""

    session: str
    epoch: int
    slot: int
    prompt_frames: int
    prompt_hash: str
    ready_ms: float  # from the request's arrival at the replica
    numerics_id: str = ""  # of the replica; a journal says whose bits it continues


@dataclass(frozen=True, slots=True)
class FrameOut:
    """80 ms of the agent, with all that a journal keeps of the step."""

    key: FrameKey
    pcm: Pcm  # [1920] int16
    text_token: int
    text: str  # the token's piece, "" for padding
    codes: Codes  # [8] int16, the agent's
    user_codes: Codes  # [8] int16
    journal_row: Codes  # [17] int16, the raw input column of the step
    replica_ms: float  # from the frame's arrival at the replica to this message; the budget is 80
    next_column: Codes | None = None  # [17] int16, the column that the step began; None from builds without it
    first_row: int = 0  # the oldest frame whose column a rebuild needs: 0 until the engine anchors


@dataclass(frozen=True, slots=True)
class Failed:
    """The conversation ended here, against its user's wish. `code` is one of serving's error codes."""

    session: str
    epoch: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Need:
    """A frame came too early (an earlier one is missing), or the epoch is over."""

    key: FrameKey
    need_frame: int


Up = OpenRequest | FrameIn | CloseRequest
Down = Ready | FrameOut | Failed | Need


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One busy slot, as a replica reports it to the router."""

    session: str
    epoch: int
    tenant: str
    slot: int
    ingress: str


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """A replica's heartbeat. Replicas' slot tables are the truth from which a router is rebuilt."""

    replica: str
    node: str
    address: str  # ws://host:port of its trunk
    slots: int
    numerics_id: str  # equal ids compute equal bits
    admitting: bool
    busy: tuple[SlotReport, ...] = field(default_factory=tuple)


class DownSink(Protocol):
    """Where a replica hands what it has for one ingress. Never blocks; a slow ingress is its own problem."""

    def __call__(self, message: Down) -> None: ...

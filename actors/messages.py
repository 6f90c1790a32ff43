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
    # Its client holds a resume token: when the trunk is lost, the slot waits for it.
    resumable: bool = False
    serial: int = 0  # how often it has been resumed; part of the token, which is good for one use
    # More than 0: JournalParts of so many bytes came before this message, and the conversation goes on from them.
    journal_bytes: int = 0
    # Take over the live slot of this session: its state stays, the epoch rises, its owner is another one.
    adopt: bool = False


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
class JournalPart:
    """A piece of a journal on its way, up or down: `Journal.to_bytes`, cut (actors.journal_parts). Parts of one journal
    come in order, with other messages between them: a journal is megabytes, and frames must not wait behind it."""

    session: str
    epoch: int
    index: int  # 0 … count - 1
    count: int
    data: bytes  # PART_BYTES at most


@dataclass(frozen=True, slots=True)
class JournalAsk:
    """Ask a replica what it has noted of a conversation; any ingress may. Answered by JournalParts that make an
    excerpt (`Journal.excerpt`) of the rows from `first_row` on, or by Failed("unknown_session")."""

    session: str
    epoch: int
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """The prompt, and what came with it of a journal, is in the KV cache: frames are welcome from now on."""

    session: str
    epoch: int
    slot: int
    prompt_frames: int
    prompt_hash: str
    ready_ms: float  # from the request's arrival at the replica
    numerics_id: str = ""  # of the replica; a journal says whose bits it continues
    next_frame: int = 0  # the first frame wanted; those before it have been answered
    exact: bool = True  # False: goes on from the journal of a replica that computes other bits


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


@dataclass(frozen=True, slots=True)
class Move:
    """Please take this conversation elsewhere. It goes on here until it is closed; said again every second.

    reason: "drain", the replica is to be emptied; "pressure", it has promised more than it can hold.
    """

    session: str
    epoch: int
    reason: str


Up = OpenRequest | FrameIn | CloseRequest | JournalPart | JournalAsk
Down = Ready | FrameOut | Failed | Need | Move | JournalPart


@dataclass(frozen=True, slots=True)
class SlotReport:
    """One busy slot, as a replica reports it to the router."""

    session: str
    epoch: int
    tenant: str
    slot: int
    ingress: str
    serial: int = 0  # see OpenRequest
    live: bool = True  # False while its prompt, or its journal, is being read
    orphan: bool = False  # its trunk was lost, and it waits to be resumed


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
    room: int | None = None  # slots that may still be given away; None: all that are not busy


class DownSink(Protocol):
    """Where a replica hands what it has for one ingress. Never blocks; a slow ingress is its own problem."""

    def __call__(self, message: Down) -> None: ...

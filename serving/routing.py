"""What is said to the session router and what it answers: plain frozen data, and the router as its callers see it."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    M = TypeVar("M", bound=DataclassInstance)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """How the router grants slots. docs/decisions/routing.md gives the reasons for each."""

    lease_s: float = 3.0  # a lease lives so long without a report from its replica
    max_waiting: int = 64  # new callers in the queue; recoveries and moves are never turned away for its length
    reserve_slots: int | None = 0  # kept free of new callers; None: as many as the largest replica has
    rebuilds_at_once: int = 4  # conversations that one replica may be rebuilding at a time
    settle_s: float = 1.0  # a new router listens so long before it takes a session it never heard of for unknown
    move_s: float = 60.0  # a prepared move that was not committed by then is undone
    log_level: str = "WARNING"


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """Ask for a slot. `after_epoch` is the highest epoch that the caller was given: 0 for a new conversation."""

    session: str
    tenant: str
    tenant_limit: int | None  # conversations the tenant may have at once in the whole cluster; None: no limit
    ingress: str
    ingress_node: str
    wait_s: float = 0.0
    after_epoch: int = 0
    avoid: tuple[str, ...] = ()  # replicas the caller has just failed to reach; the router has not noticed yet
    recovery: bool = False  # its replica died: before all new callers, into the reserve, past its tenant's limit
    deaths: int = 0  # replicas in a row that died soon after they had taken this conversation
    resumable: bool = False  # its client holds a resume token
    serial: int = 0  # how often it has been resumed
    apart: bool = False  # of a move: only to another node than the ingress's, where it is now
    unreachable: bool = False  # of a recovery: the replica was lost, and did not say that somebody else has the call


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Ask for a live conversation whose client came back: by `serial`, which its token names and which is used up."""

    session: str
    serial: int
    tenant: str
    ingress: str
    ingress_node: str
    attempt: str = ""  # the same in each repetition of one request, and in no other request


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot: on which replica, where its trunk listens, and under which epoch."""

    session: str
    epoch: int
    replica: str
    address: str
    numerics_id: str
    serial: int = 0
    node: str = ""  # if it is the ingress's own, one machine's death would take slot and journal: see `apart`


@dataclass(frozen=True, slots=True)
class ReportReply:
    """What a replica is told in answer to its report: the sessions to close, how many callers wait, and whether it
    is to empty itself."""

    close: tuple[tuple[str, int], ...]
    waiting: int
    lease_s: float
    drain: bool = False


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """The cluster in numbers. `admitting` counts replicas that take new conversations."""

    replicas: int
    admitting: int
    slots: int
    busy: int
    waiting: int
    incarnation: str


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as the router knows it. `busy` are conversations that live there, `arriving` those that are being
    opened or rebuilt, `free` what placement may still give; a slot just ended is in none of them for a moment."""

    replica: str
    node: str
    address: str
    slots: int
    busy: int
    arriving: int
    free: int
    admitting: bool
    draining: bool  # somebody asked for it to be emptied
    heard_ms: float  # since its last report
    numerics_id: str


def complete(message: M) -> M:
    """A message as this build knows it, whichever build has pickled it: what an older one did not know yet gets its
    default (fields are only ever appended, and with one); what a newer one knows more has been left out already."""
    for field in reversed(fields(message)):
        if hasattr(message, field.name):
            break
        default = field.default if field.default_factory is MISSING else field.default_factory()
        object.__setattr__(message, field.name, default)
    return message


class RouterPort(Protocol):
    """The session router as an ingress sees it, wherever it runs. A conversation's life in its calls:

        grant = await router.acquire(…)                          # a slot, epoch 1
        next = await router.prepare(… after_epoch=grant.epoch)   # a move: a second slot; the first stays in force
        await router.commit(session, next.epoch)                 # the second is in force now, the first is over …
        await router.release(session, next.epoch, opened=True)   # … or the move was given up: the first goes on
        grant = await router.acquire(… recovery=True)            # the replica died: a slot elsewhere, the old is void
        grant = await router.resume(…)                           # its client came back, here: same slot, next epoch
        await router.release(session, grant.epoch, opened=True)  # the end

    All of them may be cancelled and repeated: asking again after a lost answer gives the same grant.
    """

    async def acquire(self, request: AcquireRequest) -> Grant:
        """A slot, at once or within `wait_s`. Raises TenantLimit, NoCapacity, Quarantined, and StaleEpoch when the
        conversation has changed hands."""

    async def prepare(self, request: AcquireRequest) -> Grant:
        """A second slot on another replica than the present one, under a higher epoch, which nothing depends on
        until `commit`. Waits, like `acquire`, for up to `wait_s`. Asked again with its replica in `avoid` it gives
        another. Raises NoCapacity and StaleEpoch."""

    async def commit(self, session: str, epoch: int) -> None:
        """The prepared slot is the conversation's home from now on. Done twice, it is done once. Raises StaleEpoch:
        the conversation has changed hands, or the prepared slot has run out; and ConnectionError while the router is
        away: ask again."""

    async def resume(self, request: ResumeRequest) -> Grant:
        """The same slot for a new ingress, under the next epoch and serial; the replica learns it by OpenRequest.adopt.
        Raises UnknownSession (gone, or another tenant's) and StaleEpoch (this serial has been used)."""

    async def unspend(self, session: str, epoch: int) -> None:
        """The token that the resume to this epoch used is good again, beside the next one: its client was lost before
        it was seen to have that, or the slot could not be taken over. Called by whoever resumed it. Never raises."""

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        """Give a slot back: the conversation's (a prepared one goes with it), or the prepared one by its epoch.
        `opened` False: its replica was never asked. Never raises."""

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        """Forget an `acquire` or `prepare` whose answer is not wanted any more, by the `after_epoch` that it named: its
        place in the queue, and what it was granted. Never raises."""

    async def locate(self, session: str) -> Grant | None:
        """Where a conversation lives now."""

    async def replicas(self) -> tuple[ReplicaView, ...]:
        """All replicas, by name."""

    async def drain(self, replica: str) -> None:
        """Have a replica emptied; it is replaced when its last conversation has moved. Raises UnknownReplica."""

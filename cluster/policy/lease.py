"""What a lease is, what a replica says of its slots, and what the lease table refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

Key = tuple[str, int]  # session, epoch


class LeaseError(Exception):
    """Base of what the lease table refuses."""


class EpochConflict(LeaseError):
    """Compare-and-set failed: the conversation's epoch, or serial, is not the one the caller believed in."""

    def __init__(self, session: str, expected: int, in_force: int) -> None:
        super().__init__(session, expected, in_force)
        self.in_force = in_force

    def __str__(self) -> str:
        session, expected, in_force = self.args
        return f"session {session} is at {in_force}, not {expected}: ask again with the one in force"


class NotHeld(LeaseError):
    """Renewing, committing or releasing what one does not hold; a second release ends here too."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who asks for a slot, and how. `after_epoch` is the highest epoch that the owner was ever given."""

    session: str
    tenant: str
    owner: str  # the ingress that carries the conversation
    after_epoch: int = 0
    recovery: bool = False  # its replica is lost: the owner's word for the epoch counts, if it is higher than ours
    rebuilt: bool = False  # the replica has a journal to read before it is live: a recovery or a move
    suspect: bool = False  # see cluster.policy.quarantine
    resumable: bool = False
    serial: int = 0
    unreachable: bool = False  # the replica was lost, and has not said that the conversation is somebody else's


@dataclass(frozen=True, slots=True)
class Lease:
    """One conversation's claim on one slot of one replica."""

    session: str
    epoch: int
    tenant: str
    owner: str
    replica: str
    granted_s: float
    after_epoch: int  # the epoch that its owner named when it asked
    rebuilt: bool = False
    suspect: bool = False
    resumable: bool = False
    serial: int = 0  # how often the conversation has been resumed
    unproven: bool = False  # its client may not have learnt of this serial: the one before opens it as well
    adopted: bool = False  # granted by a former router, which may have given higher epochs that nobody reported
    confirmed: bool = False  # its replica has reported it: from then on it lives and ends with those reports
    live_s: float | None = None  # since when its replica reports it as live
    former_epoch: int | None = None  # resumed, and its replica has yet to learn it: it reports this epoch or a later
    attempt: str = ""  # which of its owner's attempts to resume it was granted
    former_owner: str = ""  # whose it was then: until the replica has learnt of the next one, the journal is there

    @classmethod
    def of(cls, claim: Claim, epoch: int, replica: str, now_s: float, last: Lease | None) -> Lease:
        """What is granted to this claim. `last`: the session's active lease, or else the one that it had last."""
        # A resume that came to nothing has used a serial up: its client may have learnt of either.
        serial = claim.serial if last is None else max(claim.serial, last.serial)
        unproven = last is not None and last.serial == serial and (last.unproven or claim.serial < serial)
        return cls(
            claim.session, epoch, claim.tenant, claim.owner, replica, now_s, claim.after_epoch,
            claim.rebuilt, claim.suspect, claim.resumable, serial, unproven,
        )  # fmt: skip

    @classmethod
    def of_report(cls, slot: Reported, replica: str, now_s: float, *, adopted: bool) -> Lease:
        """What a slot must have been granted that its replica reports, and of which nothing else is known."""
        return cls(
            slot.session, slot.epoch, slot.tenant, slot.owner, replica, now_s, slot.epoch,
            rebuilt=not slot.live, serial=slot.serial, adopted=adopted, confirmed=True,
            live_s=now_s if slot.live else None,
        )  # fmt: skip

    def resumed(self, epoch: int, owner: str, serial: int, attempt: str, now_s: float) -> Lease:
        """The same slot for another owner, of which its replica has yet to learn."""
        first = self.former_epoch is None  # else it has not learnt of this one either
        return replace(
            self, epoch=epoch, owner=owner, serial=serial, unproven=False, granted_s=now_s,
            # The former owner may be the same ingress, and nothing that it asks for as such counts any more.
            after_epoch=epoch,
            former_epoch=self.epoch if first else self.former_epoch,
            former_owner=self.owner if first else self.former_owner,
            adopted=False, attempt=attempt,
        )  # fmt: skip

    @property
    def key(self) -> Key:
        return self.session, self.epoch

    @property
    def epochs(self) -> range:
        """Under which its replica may report it."""
        return range(self.epoch if self.former_epoch is None else self.former_epoch, self.epoch + 1)

    @property
    def arriving(self) -> bool:
        """Whether its owner has yet to bring its journal there."""
        return self.rebuilt and self.live_s is None

    def is_still_of(self, owner: str, epoch: int) -> bool:
        """Whether it was this owner's at this epoch before a resume that the replica has not learnt of."""
        return owner == self.former_owner and self.former_epoch is not None and epoch >= self.former_epoch

    def is_in(self, seen: Mapping[str, int]) -> bool:
        """Whether a report of these sessions and epochs has it."""
        return seen.get(self.session, -1) in self.epochs


@dataclass(frozen=True, slots=True)
class Reported:
    """One busy slot in a replica's own table."""

    session: str
    epoch: int
    tenant: str
    owner: str
    serial: int = 0
    live: bool = True

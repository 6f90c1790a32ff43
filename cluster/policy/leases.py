"""Who owns which conversation: leases with owner, epoch and expiry.

A conversation has one *active* lease, and while it moves a *pending* one beside it, at a higher epoch on another
replica. `commit` makes the pending one active. Should the active one end without its owner's doing, the pending one
takes its place.

A lease that ended is *quarantined* for one more lease: its replica may be cut off and still speaking, or not have
heard yet, so the slot is not given away until the replica itself says that it is free, or has been silent for so long
that the router gives nobody to it at all. docs/decisions/routing.md says more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.policy.ended import EndedSlots
from cluster.policy.epochs import Epochs
from cluster.policy.lease import Claim, EpochConflict, Key, Lease, NotHeld, Reported
from cluster.policy.lease_index import LeaseIndex
from cluster.policy.quarantine import on_probation

__all__ = ["Claim", "EpochConflict", "Lease", "LeaseTable", "NotHeld", "Reported"]


class LeaseTable:
    """All leases of a cluster. It alone counts who holds what; time is an argument, in seconds of any clock."""

    def __init__(self, lease_s: float, move_s: float = 60.0, *, epochs_before: int = 0) -> None:
        """`epochs_before`: higher than any epoch that a former table can have given (cluster.policy.epochs)."""
        self.lease_s = lease_s
        self.move_s = move_s
        self._active: dict[str, Lease] = {}
        self._pending: dict[str, Lease] = {}
        self._ended_slots = EndedSlots(lease_s)
        # Reports written before a session's end are still on their way; two leases is longer than any of them lives.
        self._epochs = Epochs(epochs_before, remembered_s=2 * lease_s)
        self._index = LeaseIndex()  # of active and pending ones
        self._heard_s: dict[str, float] = {}  # when each replica last reported: what its leases live by

    def __len__(self) -> int:
        return len(self._active)

    def get(self, session: str) -> Lease | None:
        """The active lease of a session."""
        return self._active.get(session)

    def pending(self, session: str) -> Lease | None:
        """The lease it is moving to."""
        return self._pending.get(session)

    def occupied(self, replica: str) -> int:
        """Slots of a replica that are held, or may still be."""
        return self._index.count(replica) + self._ended_slots.count(replica)

    def on(self, replica: str) -> tuple[Lease, ...]:
        """The leases of a replica, active and pending."""
        return self._index.on(replica)

    def rebuilding(self, replica: str) -> int:
        """Conversations that a replica has yet to rebuild from their journals."""
        return self._index.arriving(replica)

    def has_suspect(self, replica: str, now_s: float) -> bool:
        """Whether a conversation that may have killed a replica has yet to prove itself on this one."""
        return any(lease.suspect and on_probation(lease.live_s, now_s) for lease in self.on(replica))

    def held_by(self, tenant: str) -> int:
        """Conversations a tenant has now."""
        return self._index.held_by(tenant)

    def epoch_in_force(self, session: str) -> int:
        """The epoch of the active lease, or the last one of a session that has ended; 0 for one never heard of."""
        lease = self._last(session)
        return 0 if lease is None else lease.epoch

    def highest(self, session: str) -> int:
        """The highest epoch ever given to a session, to a pending lease or one that is gone too; 0 as above."""
        return self._epochs.highest(session)

    def take_changed(self) -> set[str]:
        """The replicas whose leases have changed since this was last asked."""
        return self._index.take_changed()

    # ---- what an owner asks for -------------------------------------------------------------------------------

    def granted(self, claim: Claim, *, pending: bool = False) -> Lease | None:
        """What this very claim has been granted already: its owner asks again because an answer was lost."""
        lease = (self._pending if pending else self._active).get(claim.session)
        if lease is None or (lease.owner, lease.after_epoch) != (claim.owner, claim.after_epoch):
            return None
        return lease if lease.epoch > claim.after_epoch else None

    def check(self, claim: Claim) -> None:
        """Raises EpochConflict unless the claim names an epoch that it may: see Epochs.check."""
        self._epochs.check(claim, self._last(claim.session))

    def grant(self, claim: Claim, replica: str, now_s: float) -> Lease:
        """Give a session to a replica under the next epoch. Raises EpochConflict.

        A lease that was active until now goes to quarantine: its replica does not know yet that it is over.
        """
        self.check(claim)
        self._end(self._pending.get(claim.session), now_s)
        self._end(self._active.get(claim.session), now_s)
        return self._insert(self._active, self._next(claim, replica, now_s))

    def prepare(self, claim: Claim, replica: str, now_s: float) -> Lease:
        """A second lease for a session that moves. Raises EpochConflict, and NotHeld unless `claim.owner` holds it."""
        self.check(claim)
        lease = self._active.get(claim.session)
        if lease is None or lease.owner != claim.owner:
            raise NotHeld(f"{claim.owner} does not hold session {claim.session}: only its owner moves it")
        self._end(self._pending.get(claim.session), now_s)
        moved = replace(claim, resumable=lease.resumable, serial=lease.serial)
        return self._insert(self._pending, self._next(moved, replica, now_s))

    def commit(self, session: str, epoch: int, owner: str, now_s: float) -> Lease:
        """The pending lease becomes the active one; done again it changes nothing. Raises EpochConflict when the
        session has changed hands, NotHeld when the pending lease is not there (any more)."""
        active, pending = self._active.get(session), self._pending.get(session)
        if active is not None and (active.epoch, active.owner) == (epoch, owner):
            return active
        if active is not None and (active.owner != owner or active.after_epoch > epoch):
            raise EpochConflict(session, epoch, active.epoch)
        if pending is None or pending.epoch != epoch:
            raise NotHeld(f"nothing is prepared for session {session} at epoch {epoch}")
        self._end(active, now_s)
        # Whoever moves goes over once the next home has the whole journal; its report says so only later.
        return self._promote(pending, now_s if pending.live_s is None else pending.live_s)

    def resume(self, session: str, serial: int, tenant: str, owner: str, now_s: float, attempt: str = "") -> Lease:
        """The same slot for a new owner under the next epoch and serial; a move under way is given up.

        Raises NotHeld when the tenant has no such session, EpochConflict when the serial is not the one in force. A
        serial whose use has not reached the replica within a lease may be used again: its user has gone since. However
        often that happens, what its client may hold, the serial it came with or the next one, goes on being good.

        The same `attempt` asked again is told the same; another one of the same owner, whose client came back twice
        within that time, takes its place under an epoch of its own.
        """
        lease = self._active.get(session)
        if lease is None or lease.tenant != tenant:
            raise NotHeld(f"{tenant} has no session {session}")
        again = lease.serial == serial + 1
        unseen = again and lease.former_epoch is not None  # by the replica
        if unseen and not lease.unproven and (lease.owner, lease.attempt) == (owner, attempt):
            return lease  # asked again
        replaced = unseen and (lease.owner == owner or lease.granted_s + self.lease_s <= now_s)
        if lease.serial != serial and not replaced and not (again and lease.unproven):
            raise EpochConflict(session, serial, lease.serial)
        self._end(self._pending.get(session), now_s)
        epoch = self._epochs.next(session, lease.epoch, lease)
        self._remove(lease)
        return self._insert(self._active, lease.resumed(epoch, owner, serial + 1, attempt, now_s))

    def unspend(self, session: str, epoch: int, owner: str) -> None:
        """The serial that this resume used is good again, as good as the one that it gave: its client may have learnt
        of either. Raises NotHeld unless exactly this owner holds exactly this epoch."""
        lease = self._active.get(session)
        if lease is None or (lease.epoch, lease.owner) != (epoch, owner) or not lease.serial:
            raise NotHeld(f"{owner} has not resumed session {session} at epoch {epoch}")
        self._remove(lease)
        self._insert(self._active, replace(lease, unproven=True))

    def release(self, session: str, epoch: int, owner: str, now_s: float, *, opened: bool = True) -> Lease:
        """Give a lease back, with it the pending one; or the pending one alone, by its epoch. Raises NotHeld unless
        exactly this owner holds exactly this epoch.

        The slot is free again when its replica reports so, or at once if the replica was never asked to open it
        (`opened` false).
        """
        pending = self._pending.get(session)
        for lease in (self._active.get(session), pending):
            if lease is not None and (lease.epoch, lease.owner) == (epoch, owner):
                if lease is not pending:
                    self._end(pending, now_s)
                self._end(lease, now_s, opened=opened)
                return lease
        raise NotHeld(f"{owner} does not hold session {session} at epoch {epoch}")

    # ---- what replicas and the clock say ----------------------------------------------------------------------

    def reconcile(self, replica: str, reported: Iterable[Reported], now_s: float, *, adopt: bool) -> tuple[Key, ...]:
        """Take a replica's slot table for the truth about its slots; return the (session, epoch) it must close.

        Its leases that are in the report are renewed, those that had been confirmed and are gone are ended. Those
        never confirmed stay until they expire: the session may still be on its way to the replica. A session
        that no lease owns is closed, or with `adopt` (a router that has just started, and rebuilds itself) taken
        over as it is, unless a higher epoch is known.
        """
        self._heard_s[replica] = now_s
        to_close: list[Key] = []
        seen: dict[str, int] = {}  # a replica holds a session once
        for slot in reported:
            key = (slot.session, slot.epoch)
            seen[slot.session] = slot.epoch
            lease = self._index.find(replica, key) or self._resumed(replica, key)
            if lease is not None and not self._overdue(lease, now_s):
                self._renew(lease, slot, now_s)
            elif lease is not None or not self._take_over(replica, slot, now_s, adopt):
                self._end(lease, now_s)
                to_close.append(key)
        for lease in self.on(replica):
            if lease.confirmed and not lease.is_in(seen):
                self._lose(lease, now_s)
        if self._ended_slots.reported(replica, seen, now_s):
            self._index.changed(replica)
        return tuple(to_close)

    def forget(self, replica: str, now_s: float) -> None:
        """The replica is gone for good, and all that it held."""
        self._heard_s.pop(replica, None)
        for lease in self.on(replica):
            self._lose(lease, now_s)
        self._ended_slots.forget(replica)

    def expire(self, now_s: float) -> list[Lease]:
        """Quarantine every lease that ran out, free every slot whose quarantine ended; return the former."""
        due_s = now_s - self.lease_s
        ran_out = [lease for lease in self._index.unconfirmed() if lease.granted_s <= due_s]
        for replica in [replica for replica, heard_s in self._heard_s.items() if heard_s <= due_s]:
            del self._heard_s[replica]
            ran_out += [lease for lease in self.on(replica) if lease.confirmed]
        for lease in ran_out:
            self._lose(lease, now_s, silent=True)
        self._index.changed(*self._ended_slots.expire(now_s))
        self._epochs.expire(now_s)
        return ran_out

    # ---- how it is kept ---------------------------------------------------------------------------------------

    def _last(self, session: str) -> Lease | None:
        return self._active.get(session) or self._epochs.last_of_ended(session)

    def _next(self, claim: Claim, replica: str, now_s: float) -> Lease:
        last = self._last(claim.session)
        epoch = self._epochs.next(claim.session, claim.after_epoch, last)
        return Lease.of(claim, epoch, replica, now_s, last)

    def _resumed(self, replica: str, key: Key) -> Lease | None:
        lease = self._active.get(key[0])
        return lease if lease is not None and lease.replica == replica and key[1] in lease.epochs else None

    def _overdue(self, lease: Lease, now_s: float) -> bool:
        """A move that nobody finished: its owner has forgotten it."""
        return self._pending.get(lease.session) is lease and lease.granted_s + self.move_s <= now_s

    def _renew(self, lease: Lease, slot: Reported, now_s: float) -> None:
        """It lives by its replica's reports from now on; kept anew only when something of it changes."""
        known = lease.confirmed and (lease.former_epoch is None or slot.epoch != lease.epoch)
        if known and (lease.live_s is not None) == slot.live:
            return
        into = self._active if self._active.get(lease.session) is lease else self._pending
        self._remove(lease)
        live_s = None if not slot.live else now_s if lease.live_s is None else lease.live_s
        former_epoch = None if slot.epoch == lease.epoch else lease.former_epoch
        self._insert(into, replace(lease, confirmed=True, former_epoch=former_epoch, live_s=live_s))

    def _take_over(self, replica: str, slot: Reported, now_s: float, adopt: bool) -> bool:
        key = (slot.session, slot.epoch)
        revived = self._ended_slots.revivable(replica, key)
        if revived is not None and slot.session not in self._active and self.epoch_in_force(slot.session) == slot.epoch:
            self._ended_slots.drop(key)  # it was cut off, not dead, and nobody else has got the session since
        elif not adopt or slot.epoch <= self._epochs.highest(slot.session):
            return False
        self._end(self._pending.get(slot.session), now_s)
        self._end(self._active.get(slot.session), now_s)
        adopted = revived is None or revived.adopted
        self._insert(self._active, Lease.of_report(slot, replica, now_s, adopted=adopted))
        return True

    def _lose(self, lease: Lease, now_s: float, *, silent: bool = False) -> None:
        """A lease ends without its owner's doing: what it was moving to is its home now. `silent`: its replica has
        not said so, and may still hold it. One that is not held any more is lost already."""
        # It may have been promoted since whoever calls this looked: then it is kept as another object.
        held = self._index.find(lease.replica, lease.key)
        if held is None:
            return
        pending = self._pending.get(lease.session)
        self._end(held, now_s, opened=silent, revivable=silent)
        if pending is not None and pending is not held:
            self._promote(pending, pending.live_s)

    def _promote(self, pending: Lease, live_s: float | None) -> Lease:
        self._remove(pending)
        return self._insert(self._active, replace(pending, live_s=live_s))

    def _end(self, lease: Lease | None, now_s: float, *, opened: bool = True, revivable: bool = False) -> None:
        """Take a lease out; its slot is quarantined if the replica may know of it (`opened`)."""
        if lease is None:
            return
        self._remove(lease)
        if opened:
            self._ended_slots.add(lease, now_s, revivable=revivable)
        if lease.session not in self._active:
            self._epochs.ended(lease, now_s)

    def _insert(self, into: dict[str, Lease], lease: Lease) -> Lease:
        into[lease.session] = lease
        if into is self._active:
            self._epochs.begun(lease.session)
        self._epochs.given(lease.session, lease.epoch)
        self._index.put(lease, active=into is self._active)
        return lease

    def _remove(self, lease: Lease) -> None:
        active = self._active.get(lease.session) is lease
        del (self._active if active else self._pending)[lease.session]
        self._index.take(lease, active=active)

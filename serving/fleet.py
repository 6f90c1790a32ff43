"""The replicas as the router knows them, and which of them takes a conversation: reports in, places out."""

from __future__ import annotations

from dataclasses import dataclass

from actors.errors import UnknownReplica
from actors.messages import ReplicaReport
from cluster.policy.leases import Lease, LeaseTable
from cluster.policy.placement import PlacementIndex, Spot, reserve
from cluster.policy.quarantine import may_rebuild
from serving.routing import Grant, ReplicaView, RouterConfig


@dataclass(slots=True)
class Member:
    """One replica."""

    report: ReplicaReport
    adopt_until_s: float  # whoever has just begun to report may hold sessions that a former router granted
    heard_s: float
    draining: bool = False

    @property
    def admitting(self) -> bool:
        return self.report.admitting and not self.draining


class Fleet:
    """All replicas that report. What it knows of their leases it reads from the lease table."""

    def __init__(self, leases: LeaseTable, config: RouterConfig) -> None:
        self._leases = leases
        self._config = config
        self._members: dict[str, Member] = {}
        self._index = PlacementIndex()
        self._leaving: set[str] = set()  # those that admit nobody

    def __len__(self) -> int:
        return len(self._members)

    def grant(self, lease: Lease) -> Grant | None:
        """What the owner of a lease is told of it. None where its replica reports no more."""
        member = self._members.get(lease.replica)
        if member is None:
            return None
        report, held = member.report, (lease.session, lease.epoch, lease.replica)
        return Grant(*held, report.address, report.numerics_id, lease.serial, report.node)

    @property
    def slots(self) -> int:
        return sum(member.report.slots for member in self._members.values())

    @property
    def admitting(self) -> int:
        return sum(member.admitting for member in self._members.values())

    def heard(self, report: ReplicaReport, now_s: float) -> Member:
        """A replica has reported; whoever is new joins."""
        member = self._members.get(report.replica)
        if member is None:
            member = self._members[report.replica] = Member(report, now_s + self._config.lease_s, now_s)
        member.report, member.heard_s = report, now_s
        return member

    def drain(self, replica: str) -> None:
        """It gets nobody new any more. Raises UnknownReplica."""
        member = self._members.get(replica)
        if member is None:
            raise UnknownReplica(f"There is no replica {replica}.")
        member.draining = True
        self.refresh(replica)

    def drop(self, replica: str) -> bool:
        """It is gone; whether it was there."""
        there = self._members.pop(replica, None) is not None
        self.refresh(replica)
        return there

    def drop_silent(self, now_s: float) -> None:
        """Those that have not reported for a lease are not given anybody."""
        for name, member in list(self._members.items()):
            if member.heard_s + self._config.lease_s <= now_s:
                self.drop(name)

    def place_call(self, node: str, avoid: tuple[str, ...], urgent: int) -> Spot | None:
        """A slot for a new caller, where there is room, beyond the reserve and what `urgent` conversations wait for.
        Those are counted in slots: a conversation that has lost its own gets any, whatever load its replica sees."""
        self._catch_up()
        kept = reserve(self._config.reserve_slots, self._index, self._stranded()) + urgent
        return self._index.place(node, avoid) if self._index.free > kept else None

    def place_again(
        self, node: str, avoid: tuple[str, ...], *, suspect: bool, now_s: float, at_once: int
    ) -> Spot | None:
        """A slot for a conversation that lives, on a replica that reads fewer than `at_once` journals now."""
        self._catch_up()

        def able(replica: str) -> bool:
            return self._speaks(replica, now_s) and may_rebuild(
                self._leases.rebuilding(replica),
                at_once,
                suspect=suspect,
                has_suspect=suspect and self._leases.has_suspect(replica, now_s),
            )

        return self._index.place_again(node, avoid, able, emptiest=suspect)

    def _speaks(self, replica: str, now_s: float) -> bool:
        """Whether it has been heard of lately. One that is cut off still has its leases, and room, for a while."""
        member = self._members.get(replica)
        return member is not None and now_s - member.heard_s <= self._config.lease_s / 2

    def refresh(self, replica: str) -> None:
        """Placement learns what has become of a replica."""
        member = self._members.get(replica)
        self._leaving.discard(replica)
        if member is None:
            self._index.drop(replica)
            return
        if not member.admitting:
            self._leaving.add(replica)
        report, occupied = member.report, self._leases.occupied(replica)
        free = report.slots - max(occupied, len(report.busy))
        # Of the room that it reported, some may have been given away since.
        room = free if report.room is None else min(free, report.room - max(0, occupied - len(report.busy)))
        self._index.put(Spot(replica, report.node, report.slots, free, room, member.admitting))

    def views(self, now_s: float) -> tuple[ReplicaView, ...]:
        """All replicas, by name."""
        self._catch_up()
        return tuple(self._view(name, now_s) for name in sorted(self._members))

    def _catch_up(self) -> None:
        for replica in self._leases.take_changed():
            self.refresh(replica)

    def _stranded(self) -> int:
        """Conversations on replicas that are being emptied, and have no other slot yet."""
        return sum(
            self._leases.get(lease.session) is lease and self._leases.pending(lease.session) is None
            for replica in self._leaving
            for lease in self._leases.on(replica)
        )

    def _view(self, name: str, now_s: float) -> ReplicaView:
        member, leases, spot = self._members[name], self._leases.on(name), self._index.get(name)
        report = member.report
        return ReplicaView(
            replica=name,
            node=report.node,
            address=report.address,
            slots=report.slots,
            busy=sum(lease.live_s is not None for lease in leases),
            arriving=sum(lease.live_s is None for lease in leases),
            free=0 if spot is None else max(0, spot.room),
            admitting=member.admitting,
            draining=member.draining,
            heard_ms=(now_s - member.heard_s) * 1e3,
            numerics_id=report.numerics_id,
        )

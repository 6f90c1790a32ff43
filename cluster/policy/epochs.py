"""Epochs: which ones a session was given, which one a claim may name, which one is next. None is given twice."""

from __future__ import annotations

from cluster.policy.lease import Claim, EpochConflict, Lease


class Epochs:
    """The only place where an epoch rises. What `last` is called below is a session's active lease, or else the one
    that it had last; times are in seconds of any clock. See docs/decisions/routing.md, "No epoch twice"."""

    def __init__(self, before: int, remembered_s: float) -> None:
        """`before`: higher than any epoch that a former table can have given: it may have given some, for moves and
        resumes that came to nothing, of which no replica and not every owner knows. A session is remembered for
        `remembered_s` after its end: for so long somebody may still name one of its epochs."""
        self._remembered_s = remembered_s
        self._highest: dict[str, int] = {}  # ever given to a session
        self._unknown_up_to = before  # given to sessions of which we do not know all, or not any more
        self._ended: dict[str, tuple[Lease, float]] = {}  # sessions: the last lease, until when to remember it

    def highest(self, session: str) -> int:
        """The highest epoch ever given to a session, to a lease that is gone too; 0 for one never heard of."""
        return self._highest.get(session, 0)

    def last_of_ended(self, session: str) -> Lease | None:
        """The last lease of a session that has ended and is not forgotten yet."""
        return self._ended[session][0] if session in self._ended else None

    def check(self, claim: Claim, last: Lease | None) -> None:
        """Compare-and-set: raises EpochConflict unless the claim names the epoch in force.

        Its owner may also name that of a move which came to nothing; where the lease was taken over from a report, that
        may be one that only a former router knew. For a recovery, any epoch of the same serial will do: an ingress does
        not race with itself, and the answer that told it of the one in force may be lost. And where it is higher than
        ours it counts: this table may be younger than the conversation.

        A resume that has not reached the replica does not stand in the way of a recovery by the owner before it, where
        that replica is lost: nobody can take the conversation over from it, and who holds the journal can go on.
        """
        in_force = 0 if last is None else last.epoch
        if claim.after_epoch == in_force or (claim.recovery and claim.after_epoch > in_force):
            return
        if last is not None and last.owner == claim.owner:
            if claim.recovery and claim.serial == last.serial:
                return
            if in_force < claim.after_epoch and (last.adopted or claim.after_epoch <= self.highest(claim.session)):
                return
        if last is not None and claim.unreachable and last.is_still_of(claim.owner, claim.after_epoch):
            return
        raise EpochConflict(claim.session, claim.after_epoch, in_force)

    def next(self, session: str, after_epoch: int, last: Lease | None) -> int:
        """One that nobody has been given, whoever gave; `after_epoch` is the highest one that who asks knows of."""
        highest = self.highest(session)
        if after_epoch > highest or (last is not None and last.adopted):
            highest = max(highest, after_epoch, self._unknown_up_to)
        return highest + 1

    def given(self, session: str, epoch: int) -> None:
        """A session has got this epoch, from us or from a former table."""
        self._highest[session] = max(epoch, self.highest(session))

    def begun(self, session: str) -> None:
        """A session has an active lease."""
        self._ended.pop(session, None)

    def ended(self, last: Lease, now_s: float) -> None:
        """A session has no active lease any more."""
        self._ended[last.session] = (last, now_s + self._remembered_s)

    def expire(self, now_s: float) -> None:
        """Forget the sessions that ended long ago: of all together the highest epoch is kept."""
        for session in [session for session, (_, until_s) in self._ended.items() if until_s <= now_s]:
            del self._ended[session]
            self._unknown_up_to = max(self._unknown_up_to, self._highest.pop(session))

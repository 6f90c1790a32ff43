"""The gate in front of every stage: which entries of a batch are computed, and how the rest is answered.

It holds, per conversation, the slot, the epoch, the next frame and the answers of the last frames. With it a
caller may send any frame again after a fault: what was done is answered from the replay buffer, the next one is
done, a later one is refused with the number that is needed, and an epoch that is over can neither write nor read.

    plan = gate.admit(batch, width)         # decides, changes nothing
    rows = compute(plan.slots, plan.data)   # may raise: then nothing was promised
    reply = gate.commit(plan, rows)         # advances the frames, fills the replay buffers
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from actors.errors import StaleEpoch, UnknownSession
from graphs.stages import FrameKey, StageBatch, StageReply, Verdict

Rows = npt.NDArray[np.int16]

REPLAY_FRAMES = 25  # 2 s: longer than any retry that is still worth an answer
FENCED_SESSIONS = 4096  # ended conversations whose epochs are remembered; far more than can end in one lease


class SlotTaken(RuntimeError):
    """An open for a slot that another conversation holds: the replica's books and the stage's disagree."""


class Opened(NamedTuple):
    """What an open did. `fresh` is False when it was a repetition: the slot's state must be left alone.
    `displaced` is the slot of the same conversation's former epoch, to be reset."""

    fresh: bool
    displaced: int | None


class Answered(NamedTuple):
    """An entry that needs no computing."""

    verdict: Verdict
    detail: int
    row: Rows | None


class Plan(NamedTuple):
    """A batch, split. `compute` are indices into `keys`; `slots[i]` and `data[i]` belong to `compute[i]`."""

    keys: tuple[FrameKey, ...]
    compute: tuple[int, ...]
    slots: tuple[int, ...]
    data: Rows
    answered: dict[int, Answered]
    width: int

    def only(self, keep: Sequence[int], answered: dict[int, Answered]) -> Plan:
        """The same batch, of which only these (index into `compute`) are to be computed; the others are answered."""
        return self._replace(
            compute=tuple(self.compute[j] for j in keep),
            slots=tuple(self.slots[j] for j in keep),
            data=self.data[list(keep)],
            answered=answered,
        )


@dataclass(slots=True)
class _Entry:
    epoch: int
    slot: int
    replay: deque[Rows]  # answers of frames next_frame - len … next_frame - 1
    next_frame: int = 0
    ready: bool = True
    broken: str | None = None


class FrameGate:
    """The conversations of one stage. Plain, not thread-safe: a stage is called by one caller at a time."""

    def __init__(self, slots: int, replay_frames: int = REPLAY_FRAMES) -> None:
        self.slots = slots
        self._replay_frames = replay_frames
        self._entries: dict[str, _Entry] = {}
        self._holders: dict[int, str] = {}  # slot → session
        self._fences: OrderedDict[str, int] = OrderedDict()  # session → last epoch that has ended

    def open(self, session: str, epoch: int, slot: int, *, ready: bool = True, first_frame: int = 0) -> Opened:
        """Lets a conversation in; the only place where a higher epoch takes over from a lower one.

        `ready=False` makes its frames wait (NEED) until `set_ready`. `first_frame` is the frame it goes on
        from. Raises StaleEpoch when this or a later epoch has ended or a later one is open, and SlotTaken when
        the slot is another conversation's. Opening the same again changes nothing.
        """
        if not 0 <= slot < self.slots:
            raise SlotTaken(f"slot {slot} does not exist, this stage has {self.slots}")
        if epoch <= self._fences.get(session, -1):
            raise StaleEpoch(f"Epoch {epoch} of conversation {session} has ended.")
        known = self._entries.get(session)
        if known is not None and epoch < known.epoch:
            raise StaleEpoch(f"Conversation {session} is at epoch {known.epoch}, not {epoch}.")
        if known is not None and epoch == known.epoch:
            if slot != known.slot:
                raise SlotTaken(f"session {session} at epoch {epoch} is in slot {known.slot}, not in {slot}")
            return Opened(fresh=False, displaced=None)
        holder = self._holders.get(slot)
        if holder is not None and holder != session:
            raise SlotTaken(f"slot {slot} was opened for session {session} but belongs to session {holder}")
        displaced = None if known is None else self.close(session, known.epoch)
        self._entries[session] = _Entry(
            epoch, slot, deque(maxlen=self._replay_frames), next_frame=first_frame, ready=ready
        )
        self._holders[slot] = session
        return Opened(fresh=True, displaced=displaced)

    def close(self, session: str, epoch: int) -> int | None:
        """Ends a conversation's epoch and all before it; returns the slot that is free now, None if none is.

        A close that overtakes its open fences it: the open is refused when it comes. A close of an old epoch
        leaves the present one alone.
        """
        known = self._entries.get(session)
        if known is not None and known.epoch > epoch:
            return None
        self._fence(session, epoch)
        if known is None:
            return None
        del self._entries[session]
        del self._holders[known.slot]
        return known.slot

    def set_ready(self, session: str, ready: bool = True) -> None:
        self._entries[session].ready = ready

    def fail(self, session: str, reason: str) -> None:
        """Marks a conversation's state as unusable: all its further frames are answered FAILED until it closes."""
        self._entries[session].broken = reason

    def owner(self, slot: int) -> tuple[str, int] | None:
        """(session, epoch) in a slot."""
        session = self._holders.get(slot)
        return None if session is None else (session, self._entries[session].epoch)

    def owners(self) -> tuple[tuple[str, int], ...]:
        """(session, epoch) of all that is open."""
        return tuple((session, entry.epoch) for session, entry in self._entries.items())

    def is_ready(self, session: str, epoch: int) -> bool:
        known = self._entries.get(session)
        return known is not None and known.epoch == epoch and known.ready and known.broken is None

    def next_frame(self, session: str) -> int:
        """Raises UnknownSession."""
        if session not in self._entries:
            raise UnknownSession(f"Conversation {session} is not open here.")
        return self._entries[session].next_frame

    def admit(self, batch: StageBatch, width: int) -> Plan:
        """Decides about every entry, changing nothing. `width` is that of an answer's row.

        Raises ValueError when a session appears twice: its second frame's verdict would hang on the first's.
        """
        if len({key.session for key in batch.keys}) != len(batch.keys):
            raise ValueError("a session appears twice in one batch")
        if len(batch.keys) != batch.data.shape[0]:
            raise ValueError(f"a batch of {len(batch.keys)} keys came with {batch.data.shape[0]} rows")
        answered: dict[int, Answered] = {}
        compute: list[int] = []
        for i, key in enumerate(batch.keys):
            answer = self._answer(key)
            if answer is None:
                compute.append(i)
            else:
                answered[i] = answer
        slots = tuple(self._entries[batch.keys[i].session].slot for i in compute)
        return Plan(batch.keys, tuple(compute), slots, batch.data[compute], answered, width)

    def refuse(self, plan: Plan, bad: dict[int, str]) -> Plan:
        """Takes entries (index into `plan.compute` → reason) out of a plan and breaks their conversations."""
        if not bad:
            return plan
        answered = dict(plan.answered)
        keep = [j for j in range(len(plan.compute)) if j not in bad]
        for j, reason in bad.items():
            answered[plan.compute[j]] = Answered(Verdict.FAILED, 0, None)
            self.fail(plan.keys[plan.compute[j]].session, reason)
        return plan.only(keep, answered)

    def postpone(self, plan: Plan, slots: Collection[int]) -> Plan:
        """Takes entries of these slots out of a plan; their frames wait (NEED, with their own number)."""
        keep = [j for j, slot in enumerate(plan.slots) if slot not in slots]
        if len(keep) == len(plan.slots):
            return plan
        answered = dict(plan.answered)
        for j in set(range(len(plan.slots))) - set(keep):
            answered[plan.compute[j]] = Answered(Verdict.NEED, plan.keys[plan.compute[j]].frame, None)
        return plan.only(keep, answered)

    def commit(self, plan: Plan, rows: Rows) -> StageReply:
        """Notes what was computed (`rows` [len(plan.compute), width]) and assembles the answer to the batch."""
        if rows.shape != (len(plan.compute), plan.width):
            raise ValueError(f"{len(plan.compute)} entries of width {plan.width} were to be computed, got {rows.shape}")
        data = np.zeros((len(plan.keys), plan.width), dtype=np.int16)
        verdicts = [Verdict.DONE] * len(plan.keys)
        details = [0] * len(plan.keys)
        for j, i in enumerate(plan.compute):
            entry = self._entries[plan.keys[i].session]
            row = rows[j].copy()  # a view would keep the whole batch alive as long as one of its sessions
            entry.replay.append(row)
            entry.next_frame += 1
            data[i] = row
        for i, answer in plan.answered.items():
            verdicts[i], details[i] = answer.verdict, answer.detail
            if answer.row is not None:
                data[i] = answer.row
        return StageReply(plan.keys, tuple(verdicts), tuple(details), data)

    def _answer(self, key: FrameKey) -> Answered | None:
        """The verdict on one frame, None if it is the one to compute now."""
        entry = self._entries.get(key.session)
        if entry is None:
            fence = self._fences.get(key.session, -1)
            return Answered(Verdict.STALE, fence, None) if key.epoch <= fence else Answered(Verdict.UNKNOWN, 0, None)
        if key.epoch < entry.epoch:
            return Answered(Verdict.STALE, entry.epoch, None)
        if key.epoch > entry.epoch:
            # A new owner must open first: taking over on the strength of a frame would keep the old one's state.
            return Answered(Verdict.UNKNOWN, 0, None)
        if entry.broken is not None:
            return Answered(Verdict.FAILED, 0, None)
        back = entry.next_frame - key.frame
        if 0 < back <= len(entry.replay):
            return Answered(Verdict.REPLAYED, 0, entry.replay[-back])
        if back != 0 or not entry.ready:
            # Later than the next, done so long ago that the answer is gone, or the prompt is still on its way:
            # in each case the caller learns which frame the stage stands at.
            return Answered(Verdict.NEED, entry.next_frame, None)
        return None

    def _fence(self, session: str, epoch: int) -> None:
        self._fences[session] = max(epoch, self._fences.get(session, -1))
        self._fences.move_to_end(session)
        while len(self._fences) > FENCED_SESSIONS:
            self._fences.popitem(last=False)

"""Frame gate: replay, order, epochs; against a model, through random histories of retries and takeovers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors import gate as gate_module
from actors.errors import StaleEpoch, UnknownSession
from actors.gate import FrameGate, SlotTaken
from graphs.stages import FrameKey, StageBatch, StageReply, Verdict

SLOTS, REPLAY, WIDTH = 3, 4, 2


def batch(*keys: tuple[str, int, int]) -> StageBatch:
    """Row of a key: its frame number."""
    return StageBatch(
        tuple(FrameKey(*key) for key in keys), np.array([[key[2]] for key in keys], dtype=np.int16).reshape(-1, 1)
    )


@dataclass
class Computer:
    """The stage behind a gate: what it computes tells slot, frame and how often it has computed at all."""

    gate: FrameGate
    computed: list[tuple[int, int]] = field(default_factory=list)  # (slot, frame)

    def step(self, *keys: tuple[str, int, int]) -> StageReply:
        plan = self.gate.admit(batch(*keys), WIDTH)
        rows = np.array(
            [[slot, int(row[0])] for slot, row in zip(plan.slots, plan.data, strict=True)], dtype=np.int16
        ).reshape(-1, WIDTH)
        self.computed += [(int(slot), int(frame)) for slot, frame in rows]
        return self.gate.commit(plan, rows)

    def one(self, session: str, epoch: int, frame: int) -> tuple[Verdict, int, list[int]]:
        reply = self.step((session, epoch, frame))
        return reply.verdicts[0], reply.details[0], reply.data[0].tolist()


@pytest.fixture
def stage() -> Computer:
    return Computer(FrameGate(SLOTS, REPLAY))


class GateMachine(RuleBasedStateMachine):
    """Opens, closes, retries and takeovers by several owners of the same sessions, some of them zombies."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Computer(FrameGate(SLOTS, REPLAY))
        self.open_: dict[str, tuple[int, int]] = {}  # session → (epoch, slot)
        self.next: dict[str, int] = {}
        self.ended: dict[str, int] = {}

    @initialize()
    def start(self) -> None:
        assert self.stage.step().keys == ()

    @rule(session=st.sampled_from("abcd"), epoch=st.integers(0, 4), slot=st.integers(0, SLOTS - 1))
    def open(self, session: str, epoch: int, slot: int) -> None:
        known = self.open_.get(session)
        holder = next((s for s, (_, at) in self.open_.items() if at == slot), None)
        if epoch <= self.ended.get(session, -1) or (known is not None and epoch < known[0]):
            with pytest.raises(StaleEpoch):
                self.stage.gate.open(session, epoch, slot)
        elif known is not None and epoch == known[0]:
            if slot == known[1]:
                assert self.stage.gate.open(session, epoch, slot) == (False, None)
            else:
                with pytest.raises(SlotTaken):
                    self.stage.gate.open(session, epoch, slot)
        elif holder not in (None, session):
            with pytest.raises(SlotTaken):
                self.stage.gate.open(session, epoch, slot)
        else:
            opened = self.stage.gate.open(session, epoch, slot)
            assert opened == (True, None if known is None else known[1])
            if known is not None:
                self.ended[session] = max(known[0], self.ended.get(session, -1))
            self.open_[session] = (epoch, slot)
            self.next[session] = 0

    @rule(session=st.sampled_from("abcd"), epoch=st.integers(0, 4))
    def close(self, session: str, epoch: int) -> None:
        known = self.open_.get(session)
        freed = self.stage.gate.close(session, epoch)
        if known is not None and known[0] > epoch:
            assert freed is None
            return
        self.ended[session] = max(epoch, self.ended.get(session, -1))
        assert freed == (None if known is None else known[1])
        self.open_.pop(session, None)

    @rule(
        who=st.lists(st.sampled_from("abcd"), unique=True),
        epochs=st.lists(st.integers(0, 4), min_size=4, max_size=4),
        offsets=st.lists(st.integers(-REPLAY - 2, 2), min_size=4, max_size=4),
    )
    def step(self, who: list[str], epochs: list[int], offsets: list[int]) -> None:
        keys = [
            (session, epoch, max(0, self.next.get(session, 0) + offset))
            for session, epoch, offset in zip(who, epochs, offsets, strict=False)
        ]
        self._check(keys)

    @rule(who=st.lists(st.sampled_from("abcd"), unique=True))
    def go_on(self, who: list[str]) -> None:
        """The ordinary case: everybody's next frame under the epoch in force."""
        self._check([(session, self.open_[session][0], self.next[session]) for session in who if session in self.open_])

    def _check(self, keys: list[tuple[str, int, int]]) -> None:
        before = len(self.stage.computed)
        reply = self.stage.step(*keys)
        done = []
        for i, (session, epoch, frame) in enumerate(keys):
            verdict, row = reply.verdicts[i], reply.data[i].tolist()
            known = self.open_.get(session)
            if known is None or epoch != known[0]:
                in_force = known[0] if known is not None else self.ended.get(session, -1)
                stale = epoch < in_force or (known is None and epoch <= in_force)
                assert verdict is (Verdict.STALE if stale else Verdict.UNKNOWN)
                assert reply.details[i] == (in_force if stale else 0)
                assert row == [0, 0]
            elif frame == self.next[session]:
                assert verdict is Verdict.DONE
                assert row == [known[1], frame]
                done.append((known[1], frame))
                self.next[session] += 1
            elif self.next[session] - REPLAY <= frame < self.next[session]:
                assert verdict is Verdict.REPLAYED
                assert row == [known[1], frame]
            else:
                assert verdict is Verdict.NEED
                assert reply.details[i] == self.next[session]
                assert row == [0, 0]
        assert self.stage.computed[before:] == done

    @invariant()
    def owners_agree(self) -> None:
        for slot in range(SLOTS):
            owner = next(((s, epoch) for s, (epoch, at) in self.open_.items() if at == slot), None)
            assert self.stage.gate.owner(slot) == owner


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_lost_reply_is_answered_from_the_replay_buffer_and_computed_once(stage: Computer) -> None:
    stage.gate.open("a", 1, 2)
    assert stage.one("a", 1, 0) == (Verdict.DONE, 0, [2, 0])
    assert stage.one("a", 1, 0) == (Verdict.REPLAYED, 0, [2, 0])
    assert stage.computed == [(2, 0)]


def test_a_frame_that_comes_too_early_names_the_one_that_is_due(stage: Computer) -> None:
    stage.gate.open("a", 1, 0)
    assert stage.one("a", 1, 3) == (Verdict.NEED, 0, [0, 0])


def test_a_computation_that_raises_promises_nothing(stage: Computer) -> None:
    stage.gate.open("a", 1, 0)
    stage.gate.admit(batch(("a", 1, 0)), WIDTH)  # and then the lane raised
    assert stage.one("a", 1, 0)[0] is Verdict.DONE


def test_a_broken_conversation_fails_alone_until_it_closes(stage: Computer) -> None:
    stage.gate.open("a", 1, 0)
    stage.gate.open("b", 1, 1)
    stage.gate.fail("a", "nonsense came")
    assert stage.step(("a", 1, 0), ("b", 1, 0)).verdicts == (Verdict.FAILED, Verdict.DONE)
    stage.gate.close("a", 1)
    stage.gate.open("a", 2, 0)
    assert stage.one("a", 2, 0)[0] is Verdict.DONE


def test_entries_refused_before_computing_break_only_their_own_conversation(stage: Computer) -> None:
    for slot, session in enumerate("abc"):
        stage.gate.open(session, 1, slot)
    plan = stage.gate.refuse(stage.gate.admit(batch(("a", 1, 0), ("b", 1, 0), ("c", 1, 0)), WIDTH), {1: "bad codes"})
    assert plan.slots == (0, 2)
    reply = stage.gate.commit(plan, np.array([[5, 5], [6, 6]], dtype=np.int16))
    assert reply.verdicts == (Verdict.DONE, Verdict.FAILED, Verdict.DONE)
    assert reply.data.tolist() == [[5, 5], [0, 0], [6, 6]]
    assert stage.one("b", 1, 1)[0] is Verdict.FAILED


def test_frames_wait_until_the_prompt_is_in(stage: Computer) -> None:
    stage.gate.open("a", 1, 0, ready=False)
    assert stage.one("a", 1, 0)[:2] == (Verdict.NEED, 0)
    stage.gate.set_ready("a")
    assert stage.one("a", 1, 0)[0] is Verdict.DONE


def test_a_close_that_overtakes_its_open_fences_it(stage: Computer) -> None:
    assert stage.gate.close("a", 3) is None
    with pytest.raises(StaleEpoch, match="has ended"):
        stage.gate.open("a", 3, 0)
    assert stage.gate.open("a", 4, 0).fresh


def test_a_conversation_may_go_on_from_a_later_frame(stage: Computer) -> None:
    stage.gate.open("a", 2, 0, first_frame=100)
    assert stage.one("a", 2, 99)[:2] == (Verdict.NEED, 100)
    assert stage.one("a", 2, 100)[0] is Verdict.DONE
    assert stage.gate.next_frame("a") == 101


def test_a_session_may_not_appear_twice_in_a_batch(stage: Computer) -> None:
    stage.gate.open("a", 1, 0)
    with pytest.raises(ValueError, match="twice"):
        stage.step(("a", 1, 0), ("a", 1, 1))


def test_rows_of_another_shape_than_promised_are_refused(stage: Computer) -> None:
    stage.gate.open("a", 1, 0)
    plan = stage.gate.admit(batch(("a", 1, 0)), WIDTH)
    with pytest.raises(ValueError, match="were to be computed"):
        stage.gate.commit(plan, np.zeros((1, WIDTH + 1), dtype=np.int16))
    with pytest.raises(ValueError, match="came with"):
        stage.gate.admit(StageBatch((FrameKey("a", 1, 0),), np.zeros((0, 1), dtype=np.int16)), WIDTH)


def test_ended_conversations_are_remembered_but_not_for_ever(stage: Computer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "FENCED_SESSIONS", 2)
    for session in "abc":
        stage.gate.open(session, 1, 0)
        stage.gate.close(session, 1)
    assert stage.one("c", 1, 0)[0] is Verdict.STALE
    assert stage.one("a", 1, 0)[0] is Verdict.UNKNOWN


def test_slots_and_sessions_that_do_not_exist(stage: Computer) -> None:
    with pytest.raises(SlotTaken, match="does not exist"):
        stage.gate.open("a", 1, SLOTS)
    with pytest.raises(UnknownSession):
        stage.gate.next_frame("a")
    assert not stage.gate.is_ready("a", 1)

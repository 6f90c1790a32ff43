"""A real engine behind its stage, journaled, lost, and rebuilt in another one from the journal's bytes."""

from __future__ import annotations

import numpy as np
import pytest

from actors.converse_stage import EngineStage
from actors.journal import Journal
from actors.messages import FrameOut
from graphs.anchors import AnchorPolicy
from graphs.slot_engine import SlotEngine, StepOut
from graphs.stages import FrameKey, Past, PromptInfo, SessionSpec, StageBatch, Verdict
from tests.golden import golden_lm, golden_prompt, random_user
from tests.stage_fakes import NO_FRAMES

SPEC = SessionSpec("golden", "", 11)
PCM = np.zeros(1920, dtype=np.int16)


class GoldenEngine:
    """The golden model's slots, opened by spec, as graphs.engine.ConversationEngine has them."""

    def __init__(self, slots: int) -> None:
        self._engine = SlotEngine(golden_lm(), slots, anchors=AnchorPolicy(every=20, lead=4))
        assert self._engine.prompt_limit - golden_prompt().frames < 16  # no room: the window slides

    def open(self, slot: int, spec: SessionSpec, *, past: Past | None = None, tenant: str | None = None) -> PromptInfo:
        self._engine.open(slot, golden_prompt(), spec.sampling, spec.seed, past=past)
        return PromptInfo(golden_prompt().frames, golden_prompt().digest)

    def step(self, slots: tuple[int, ...], codes: np.ndarray) -> StepOut:
        return self._engine.step(slots, codes)

    def close(self, slot: int) -> None:
        self._engine.close(slot)


def stage_of(slots: int) -> EngineStage:
    return EngineStage(GoldenEngine(slots), slots, golden_lm().config.card)


def speak(stage: EngineStage, journal: Journal, user: np.ndarray, frames: range) -> np.ndarray:
    """Lets the stage answer `frames`, journaled as a replica does; returns their tokens."""
    tokens = []
    for frame in frames:
        key = FrameKey("s", 1, frame)
        journal.heard(frame, PCM)
        reply = stage.step(StageBatch((key,), user[frame : frame + 1]))
        assert reply.frames.verdicts == (Verdict.DONE,)
        said = reply.frames.data[0]
        first_row, begun = int(reply.first_rows[0]), reply.next_columns[0]
        journal.take(
            FrameOut(key, PCM, int(said[0]), "", said[1:], user[frame], reply.journal[0], 1.0, begun, first_row)
        )
        tokens.append(said)
    return np.stack(tokens)


@pytest.mark.parametrize("with_pending", [True, False])
def test_a_stage_goes_on_from_a_journals_bytes(with_pending: bool) -> None:
    user, cut = random_user(60, 2), 41
    lost, journal = stage_of(1), Journal("s", SPEC)
    lost.open("s", 1, 0, SPEC)
    while not lost.step(NO_FRAMES).ready:
        pass
    speak(lost, journal, user, range(cut))
    if not with_pending:
        journal.pending = journal.pending[:0]
    copy = Journal.from_bytes(journal.to_bytes())
    expected = speak(lost, journal, user, range(cut, 60))

    found = stage_of(3)
    found.open("s", 1, 2, copy.spec, copy.past(), "tenant")
    early = found.step(StageBatch((FrameKey("s", 1, cut),), user[cut : cut + 1]))
    assert (early.frames.verdicts, early.frames.details) == ((Verdict.NEED,), (cut,))
    while not early.ready:
        early = found.step(NO_FRAMES)
    assert np.array_equal(speak(found, copy, user, range(cut, 60)), expected)
    assert copy.first_row == journal.first_row
    assert np.array_equal(copy.rows.array(), journal.rows.array())


def test_the_number_of_an_anchors_first_row_may_be_large() -> None:
    """It passes the gate as two numbers of 16 bits, answered again from its buffer as well."""

    class Late(GoldenEngine):
        def step(self, slots: tuple[int, ...], codes: np.ndarray) -> StepOut:
            return super().step(slots, codes)._replace(first_rows=np.full(len(slots), 1_234_567, dtype=np.int32))

    stage = EngineStage(Late(1), 1, golden_lm().config.card)
    stage.open("s", 1, 0, SPEC)
    while not stage.step(NO_FRAMES).ready:
        pass
    for verdict in (Verdict.DONE, Verdict.REPLAYED):
        reply = stage.step(StageBatch((FrameKey("s", 1, 0),), random_user(1, 0)))
        assert reply.frames.verdicts == (verdict,)
        assert reply.first_rows.tolist() == [1_234_567]
        assert (reply.next_columns[0, :9] >= 0).all()


def test_a_journal_is_cut_where_the_engine_anchored() -> None:
    journal, row, eight = Journal("s", SPEC), np.zeros(17, dtype=np.int16), np.zeros(8, dtype=np.int16)
    for frame in range(30):
        journal.heard(frame, PCM)
        first_row = 0 if frame < 20 else 12
        journal.take(FrameOut(FrameKey("s", 1, frame), PCM, 3, "", eight, eight, row, 1.0, row, first_row))
    assert (journal.anchor_frame, journal.first_row, journal.next_frame) == (20, 12, 30)
    past = Journal.from_bytes(journal.to_bytes()).past()
    assert (past.first_row, len(past.rows), past.next_frame) == (12, 18, 30)

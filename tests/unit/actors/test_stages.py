"""The stages behind their gates: what they compute, what they refuse, what they leave alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from actors.codec_stage import DecoderStage, EncoderStage
from actors.converse_stage import EngineStage
from actors.errors import BadRequest, JournalError, StaleEpoch
from graphs.stages import CodecPast, CodecStage, ConverseStage, FrameKey, SessionSpec, StageBatch, Verdict
from tests.stage_fakes import CARD, NO_FRAMES, FakeDecoderLane, FakeEncoderLane, FakeEngine

Rows = npt.NDArray[np.int16]
SLOTS = 3
SPEC = SessionSpec("v", "", 5)


def batch(width: int, *entries: tuple[str, int, int, int]) -> StageBatch:
    """Entries are session, epoch, frame, value of the row."""
    data = np.array([[value] * width for *_, value in entries], dtype=np.int16).reshape(-1, width)
    return StageBatch(tuple(FrameKey(session, epoch, frame) for session, epoch, frame, _ in entries), data)


def engine_stage(prompt_steps: int = 1) -> tuple[FakeEngine, EngineStage]:
    engine = FakeEngine(SLOTS, prompt_steps)
    return engine, EngineStage(engine, SLOTS, CARD)


def primed(*sessions: str) -> tuple[FakeEngine, EngineStage]:
    engine, stage = engine_stage()
    for slot, session in enumerate(sessions):
        stage.open(session, 1, slot, SPEC)
    stage.step(NO_FRAMES)
    return engine, stage


def test_they_are_the_stages_of_the_contract() -> None:
    codecs: list[CodecStage] = [
        EncoderStage(FakeEncoderLane(SLOTS), SLOTS),
        DecoderStage(FakeDecoderLane(SLOTS), SLOTS, CARD),
    ]
    converse: ConverseStage = engine_stage()[1]
    for stage in codecs:
        stage.close("nobody", 0)
    converse.close("nobody", 0)


# ---- codec ----


def test_a_stream_depends_on_its_own_frames_alone() -> None:
    alone, among = (EncoderStage(FakeEncoderLane(SLOTS), SLOTS) for _ in range(2))
    alone.open("a", 1, 0)
    for slot, session in enumerate("cba"):
        among.open(session, 1, slot)
    for frame in range(3):
        want = alone.step(batch(1920, ("a", 1, frame, frame))).data
        got = among.step(batch(1920, ("b", 1, frame, 99), ("a", 1, frame, frame))).data
        np.testing.assert_array_equal(got[1], want[0])


def test_a_slots_next_owner_starts_afresh() -> None:
    lane = FakeEncoderLane(SLOTS)
    stage = EncoderStage(lane, SLOTS)
    stage.open("a", 1, 0)
    first = stage.step(batch(1920, ("a", 1, 0, 5))).data
    stage.close("a", 1)
    assert lane.state[0] == 0, "what a caller said is wiped with its call"
    stage.open("b", 1, 0)
    np.testing.assert_array_equal(stage.step(batch(1920, ("b", 1, 0, 5))).data, first)


def test_opening_again_leaves_a_running_stream_alone_and_a_takeover_resets_it() -> None:
    lane = FakeEncoderLane(SLOTS)
    stage = EncoderStage(lane, SLOTS)
    stage.open("a", 1, 0)
    stage.step(batch(1920, ("a", 1, 0, 5)))
    running = lane.state[0]
    stage.open("a", 1, 0)
    assert lane.state[0] == running
    stage.open("a", 2, 1)
    assert lane.state[:2] == [0, 0]
    assert stage.step(batch(1920, ("a", 1, 1, 5))).verdicts == (Verdict.STALE,)
    with pytest.raises(StaleEpoch):
        stage.open("a", 1, 2)


@pytest.mark.parametrize("value", [-1, CARD, 32_767])
def test_codes_out_of_range_break_one_conversation_and_reach_no_embedding(value: int) -> None:
    stage = DecoderStage(FakeDecoderLane(SLOTS), SLOTS, CARD)
    stage.open("a", 1, 0)
    stage.open("b", 1, 1)
    reply = stage.step(batch(8, ("a", 1, 0, value), ("b", 1, 0, 3)))
    assert reply.verdicts == (Verdict.FAILED, Verdict.DONE)
    assert stage.step(batch(8, ("a", 1, 0, 3), ("b", 1, 1, 3))).verdicts == (Verdict.FAILED, Verdict.DONE)


def test_a_batch_of_the_wrong_width_or_type_is_refused_whole() -> None:
    codec = EncoderStage(FakeEncoderLane(SLOTS), SLOTS)
    with pytest.raises(ValueError, match=r"rows are \[1920\]"):
        codec.step(batch(8, ("a", 1, 0, 0)))
    with pytest.raises(ValueError, match="int16"):
        engine_stage()[1].step(StageBatch((), np.zeros((0, 8), dtype=np.float32)))  # type: ignore[arg-type] # the mistake


# ---- converse ----


def test_a_conversation_is_ready_once_its_prompt_is_in() -> None:
    _, stage = engine_stage(prompt_steps=3)
    assert stage.open("a", 1, 0, SPEC) == (30, "hash-of-v")
    replies = [stage.step(NO_FRAMES) for _ in range(3)]
    assert [reply.pending for reply in replies] == [1, 1, 0]
    assert [reply.ready for reply in replies] == [(), (), (("a", 1),)]


def test_a_frame_before_ready_is_told_to_wait() -> None:
    _, stage = engine_stage(prompt_steps=2)
    stage.open("a", 1, 0, SPEC)
    assert stage.step(batch(8, ("a", 1, 0, 1))).frames.verdicts == (Verdict.NEED,)
    stage.step(NO_FRAMES)
    assert stage.step(batch(8, ("a", 1, 0, 1))).frames.verdicts == (Verdict.DONE,)


def test_a_replayed_frame_brings_tokens_and_journal_and_costs_no_step() -> None:
    engine, stage = primed("a")
    first = stage.step(batch(8, ("a", 1, 0, 4)))
    state = list(engine.state)
    again = stage.step(batch(8, ("a", 1, 0, 4)))
    assert again.frames.verdicts == (Verdict.REPLAYED,)
    np.testing.assert_array_equal(again.frames.data, first.frames.data)
    np.testing.assert_array_equal(again.journal, first.journal)
    assert engine.state == state


def test_frames_while_others_prefill() -> None:
    _, stage = primed("a")
    stage.open("b", 1, 1, SPEC)
    reply = stage.step(batch(8, ("a", 1, 0, 4)))
    assert reply.frames.verdicts == (Verdict.DONE,)
    assert reply.ready == (("b", 1),)


def test_a_bad_prompt_is_refused_with_the_engines_sentence_and_holds_nothing() -> None:
    engine, stage = engine_stage()
    with pytest.raises(BadRequest, match="shorten it"):
        stage.open("a", 1, 0, SessionSpec("v", "bad", 1))
    assert not engine.open_slots
    stage.open("b", 1, 0, SPEC)
    assert stage.step(NO_FRAMES).ready == (("b", 1),)


def test_opening_again_has_ready_said_again() -> None:
    _, stage = primed("a")
    assert stage.step(NO_FRAMES).ready == ()
    assert stage.open("a", 1, 0, SPEC) == (10, "hash-of-v")
    assert stage.step(NO_FRAMES).ready == (("a", 1),)
    assert stage.step(NO_FRAMES).ready == ()
    stage.open("a", 1, 0, SPEC)
    stage.close("a", 1)
    assert stage.step(NO_FRAMES).ready == ()


def test_closing_during_the_prompt_frees_the_slot() -> None:
    engine, stage = engine_stage(prompt_steps=5)
    stage.open("a", 1, 0, SPEC)
    stage.step(NO_FRAMES)
    stage.close("a", 1)
    stage.close("a", 1)
    assert not engine.open_slots
    assert stage.step(NO_FRAMES).pending == 0


def test_a_takeover_begins_again() -> None:
    engine, stage = primed("a")
    stage.step(batch(8, ("a", 1, 0, 4)))
    stage.open("a", 2, 0, SPEC)
    stage.close("a", 1)  # the former owner's, late
    assert engine.open_slots == {0}
    assert stage.step(batch(8, ("a", 1, 1, 4))).frames.verdicts == (Verdict.STALE,)
    assert stage.step(batch(8, ("a", 2, 0, 4))).frames.verdicts == (Verdict.DONE,)


def test_codes_out_of_range_do_not_reach_the_engine() -> None:
    _, stage = primed("a", "b")
    reply = stage.step(batch(8, ("a", 1, 0, CARD), ("b", 1, 0, 4)))
    assert reply.frames.verdicts == (Verdict.FAILED, Verdict.DONE)
    assert not reply.frames.data[0].any()


# ---- what was held elsewhere ----


def past(width: int, frames: int) -> CodecPast:
    return CodecPast(np.arange(frames * width, dtype=np.int16).reshape(frames, width) % 7, frames)


def test_a_stream_with_a_past_takes_its_frames_when_it_has_caught_up() -> None:
    lost, found = (EncoderStage(FakeEncoderLane(SLOTS), SLOTS) for _ in range(2))
    lost.open("a", 1, 0)
    for frame, pcm in enumerate(past(1920, 3).rows):
        lost.step(StageBatch((FrameKey("a", 1, frame),), pcm[None]))
    want = lost.step(batch(1920, ("a", 1, 3, 5))).data

    assert found.open("a", 2, 1, past(1920, 3))
    for left in (1, 1, 0):
        early = found.step(batch(1920, ("a", 2, 3, 5)))
        assert (early.verdicts, early.details) == ((Verdict.NEED,), (3,))
        reply = found.rebuild(0.0)
        assert reply == ((("a", 2),) if not left else (), left)
    assert found.rebuild(1.0) == ((), 0)
    np.testing.assert_array_equal(found.step(batch(1920, ("a", 2, 3, 5))).data, want)
    assert found.step(batch(1920, ("a", 2, 2, 5))).verdicts == (Verdict.NEED,), "what it did elsewhere is not here"


def test_the_same_open_again_does_not_begin_a_rebuild_anew() -> None:
    stage = EncoderStage(FakeEncoderLane(SLOTS), SLOTS)
    stage.open("a", 1, 0, past(1920, 3))
    stage.rebuild(0.0)
    stage.open("a", 1, 0, past(1920, 3))
    assert [stage.rebuild(0.0).pending for _ in range(2)] == [1, 0]


def test_a_rebuild_ends_with_its_call_or_its_epoch() -> None:
    lane = FakeEncoderLane(SLOTS)
    stage = EncoderStage(lane, SLOTS)
    stage.open("a", 1, 0, past(1920, 3))
    stage.rebuild(0.0)
    stage.close("a", 1)
    assert (stage.rebuild(1.0), lane.state[0]) == (((), 0), 0)
    stage.open("b", 1, 0, past(1920, 3))
    stage.open("b", 2, 1)
    assert stage.rebuild(1.0) == ((), 0)
    assert stage.step(batch(1920, ("b", 2, 0, 5))).verdicts == (Verdict.DONE,)


@pytest.mark.parametrize(
    "bad",
    [
        CodecPast(np.full((3, 8), CARD, dtype=np.int16), 3),
        CodecPast(np.full((3, 8), -1, dtype=np.int16), 3),
        CodecPast(np.zeros((3, 9), dtype=np.int16), 3),
        CodecPast(np.zeros((3, 8), dtype=np.int16), 2),
        CodecPast(np.zeros((3, 8), dtype=np.int32), 3),  # type: ignore[arg-type] # the mistake
    ],
)
def test_a_past_that_cannot_be_is_refused_and_holds_nothing(bad: CodecPast) -> None:
    stage = DecoderStage(FakeDecoderLane(SLOTS), SLOTS, CARD)
    with pytest.raises(JournalError):
        stage.open("a", 1, 0, bad)
    assert stage.rebuild(1.0) == ((), 0)
    stage.open("b", 1, 0)


def test_a_past_without_audio_is_gone_on_from_at_once_and_said_to_be_inexact() -> None:
    stage = DecoderStage(FakeRewindable(SLOTS), SLOTS, CARD)
    assert not stage.open("a", 1, 0, CodecPast(np.zeros((0, 8), dtype=np.int16), 40))
    assert stage.step(batch(8, ("a", 1, 40, 1))).verdicts == (Verdict.DONE,)


class FakeRewindable(FakeDecoderLane):
    def snapshot(self, slot: int) -> dict[str, torch.Tensor]:
        return {"frames": torch.zeros((), dtype=torch.int64)}

    def restore(self, slot: int, snapshot: dict[str, torch.Tensor]) -> None:
        assert snapshot["frames"].item() == 40


def test_a_stage_lets_go_of_everything() -> None:
    codec, (engine, converse) = EncoderStage(FakeEncoderLane(SLOTS), SLOTS), primed("a", "b")
    codec.open("a", 3, 0)
    codec.open("b", 1, 1, past(1920, 3))
    for stage in (codec, converse):
        stage.clear()
        stage.clear()
    assert engine.open_slots == set()
    assert codec.rebuild(1.0) == ((), 0)
    with pytest.raises(StaleEpoch):
        codec.open("a", 3, 0)
    codec.open("a", 4, 1)

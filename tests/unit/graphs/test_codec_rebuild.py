"""A codec's stream rebuilt from its last frames says, bit for bit, what the stream that was lost would have said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.journal import FRAMES_PER_S, RECEPTIVE_S
from graphs.codec import DecoderLane, EncoderLane, Int16
from graphs.codec_rebuild import HEARD_FRAMES, LaneRebuild
from graphs.sampling import HAS_NUMBA
from graphs.stages import CodecPast
from models.config import CodecTransformerConfig, MimiConfig, QuantizerConfig, SeanetConfig
from models.demo_checkpoint import random_mimi
from models.mimi import Mimi

CONFIG = MimiConfig(
    seanet=SeanetConfig(dimension=32, n_filters=2),
    transformer=CodecTransformerConfig(d_model=32, num_heads=2, num_layers=2, context=12, dim_feedforward=32),
    quantizer=QuantizerConfig(dimension=8, n_q=8, bins=64),
)
FRAMES = 3 * CONFIG.receptive_frames  # 16 each: the rings of 6 frames wrap eight times
SLOTS = 6  # two groups, one of them not full


def codec() -> Mimi:
    mimi = Mimi(CONFIG).eval()
    mimi.load_state_dict(random_mimi(CONFIG))
    # Untrained layer scales of 0.01 would hide what attention remembers.
    for name, parameter in mimi.named_parameters():
        if "layer_scale" in name:
            torch.nn.init.constant_(parameter, 0.7)
    return mimi


MIMI = codec()
RNG = np.random.default_rng(5)
SPEECH = RNG.integers(-20_000, 20_000, (FRAMES + 8, 1920)).astype(np.int16)
CODES = RNG.integers(0, 64, (FRAMES + 8, 8)).astype(np.int16)
LANES = {"encoder": (EncoderLane, SPEECH), "decoder": (DecoderLane, CODES)}


def streamed(direction: str) -> Int16:
    make, rows = LANES[direction]
    lane = make(MIMI, 1)
    return np.concatenate([lane.run([0], row[None]) for row in rows])


UNDISTURBED = {direction: streamed(direction) for direction in LANES}


def finish(rebuild: LaneRebuild, budget_s: float = 0.0) -> list[int]:
    done: list[int] = []
    while len(rebuild):
        done += rebuild.run(budget_s)
    return done


def goes_on(lane: EncoderLane | DecoderLane, direction: str, slot: int, cut: int) -> bool:
    """Whether the next eight frames in `slot` are those of the stream that was never lost."""
    rows, expected = LANES[direction][1], UNDISTURBED[direction]
    said = np.concatenate([lane.run([slot], rows[frame : frame + 1]) for frame in range(cut, cut + 8)])
    return np.array_equal(said, expected[cut : cut + 8])


@pytest.mark.parametrize("direction", LANES)
@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, FRAMES), min_size=1, max_size=SLOTS),
    kept=st.integers(CONFIG.receptive_frames, FRAMES + 8),
    budget_s=st.sampled_from([0.0, 0.001, 1.0]),
)
def test_lost_at_any_frame(direction: str, cuts: list[int], kept: int, budget_s: float) -> None:
    """Several at once, some from all they heard and some from what a journal keeps of it."""
    make, rows = LANES[direction]
    lane = make(MIMI, SLOTS)
    rebuild = LaneRebuild(lane, CONFIG.receptive_frames)
    for slot, cut in enumerate(cuts):
        assert rebuild.begin(slot, CodecPast(rows[max(0, cut - kept) : cut], cut))
    assert sorted(finish(rebuild, budget_s)) == list(range(len(cuts)))
    assert all(goes_on(lane, direction, slot, cut) for slot, cut in enumerate(cuts))


@pytest.mark.parametrize("direction", LANES)
def test_a_neighbour_that_talks_meanwhile_notices_nothing_and_disturbs_nothing(direction: str) -> None:
    make, rows = LANES[direction]
    lane, cut = make(MIMI, SLOTS), FRAMES
    rebuild = LaneRebuild(lane, CONFIG.receptive_frames)
    rebuild.begin(2, CodecPast(rows[:cut], cut))
    said = []
    for frame in range(cut):
        said.append(lane.run([1], rows[frame : frame + 1]))
        rebuild.run(0.0)
    assert not len(rebuild)
    assert np.array_equal(np.concatenate(said), UNDISTURBED[direction][:cut])
    assert goes_on(lane, direction, 2, cut)


@pytest.mark.parametrize("direction", LANES)
def test_the_reach_is_not_claimed_to_be_longer_than_needed(direction: str) -> None:
    """Half of it is not enough, or these tests would not notice what a stream forgets; and less than it is said to be
    inexact."""
    make, rows = LANES[direction]
    lane, cut, half = make(MIMI, 1), FRAMES, CONFIG.receptive_frames // 2
    rebuild = LaneRebuild(lane, CONFIG.receptive_frames)
    assert not rebuild.begin(0, CodecPast(rows[cut - half : cut], cut))
    finish(rebuild)
    assert not goes_on(lane, direction, 0, cut)


def test_the_published_codecs_reach_is_within_what_a_journal_keeps() -> None:
    assert MimiConfig().receptive_frames == 998 <= RECEPTIVE_S * FRAMES_PER_S


def test_what_was_dropped_is_not_worked_on() -> None:
    lane = EncoderLane(MIMI, SLOTS)
    rebuild = LaneRebuild(lane)
    for slot in (0, 1):
        rebuild.begin(slot, CodecPast(SPEECH[:5], 5))
    rebuild.drop(0)
    rebuild.drop(4)
    assert finish(rebuild) == [1]


class SlowLane:
    """A lane of groups of four that takes 10 ms of a fake clock for each frame of a group."""

    group, run_most = 4, 2

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turns_s = 0.0  # of others, for which a call has to wait
        self.calls: list[list[int]] = []  # a frame of some slots
        self.heard: list[bool] = []

    def replay(self, slots: list[int], data: Int16, *, outputs: bool) -> None:
        assert len(data) == len(slots)
        assert data.shape[1] <= self.run_most
        self.calls += [list(slots)] * data.shape[1]
        self.heard += [outputs] * data.shape[1]
        self.now_s += 0.010 * data.shape[1] * len({slot // 4 for slot in slots}) + self.turns_s


@pytest.mark.parametrize(("budget_s", "most_s"), [(0.0, 0.010), (0.015, 0.010), (0.025, 0.020), (0.25, 0.25)])
def test_a_call_keeps_to_its_budget(budget_s: float, most_s: float) -> None:
    """Frames of others wait behind it. One frame of one group is the least it can do."""
    lane = SlowLane()
    rebuild = LaneRebuild(lane, clock=lambda: lane.now_s)  # type: ignore[arg-type]  # has no streams to restore
    for slot in range(12):
        rebuild.begin(slot, CodecPast(SPEECH[:9], 9))
    rebuild.run(0.0)  # it learns what a group costs
    while len(rebuild):
        before = lane.now_s
        rebuild.run(budget_s)
        assert lane.now_s - before <= most_s + 1e-9
    assert sum(map(len, lane.calls)) == 12 * 9


def test_what_stood_behind_others_frames_is_not_taken_for_work() -> None:
    lane = SlowLane()
    rebuild = LaneRebuild(lane, clock=lambda: lane.now_s)  # type: ignore[arg-type]  # as above
    rebuild.begin(0, CodecPast(SPEECH[:27], 27))
    rebuild.run(0.0)
    lane.turns_s = 0.020
    for piece in range(1, 4):
        rebuild.run(0.025)
        assert len(lane.calls) == 1 + 2 * piece, "two frames fit, whatever it waited for before; and no more are begun"
    lane.turns_s = 1.0
    for _ in range(3):
        rebuild.run(0.025)
    assert len(lane.calls) < 1 + 2 * 6, "what is always so is what it takes"


def test_neighbours_of_a_group_advance_together() -> None:
    """An idle slot of a busy group costs as much as a busy one."""
    lane = SlowLane()
    rebuild = LaneRebuild(lane, clock=lambda: lane.now_s)  # type: ignore[arg-type]  # as above
    for slot in (5, 0, 6, 1):
        rebuild.begin(slot, CodecPast(SPEECH[:3], 3))
    assert finish(rebuild) == [5, 6, 0, 1]
    assert lane.calls == [[5, 6]] * 3 + [[0, 1]] * 3


def test_only_the_last_frames_are_run_in_full() -> None:
    lane = SlowLane()
    rebuild = LaneRebuild(lane, clock=lambda: lane.now_s)  # type: ignore[arg-type]  # as above
    rebuild.begin(0, CodecPast(SPEECH[:21], 21))
    finish(rebuild, budget_s=1.0)
    assert lane.heard == [False] * (21 - HEARD_FRAMES) + [True] * HEARD_FRAMES


@pytest.mark.parametrize("direction", LANES)
@pytest.mark.parametrize("cut", [6, 32])
@pytest.mark.parametrize("frames", [2, 5, 16])
def test_several_frames_a_call_leave_the_same_bits(direction: str, frames: int, cut: int) -> None:
    """From a stream's first frame, and beyond the rings' wrap; two streams of different age in one call, and a third
    that is not touched."""
    make, rows = LANES[direction]
    lane = make(MIMI, 3)
    assert lane.run_most == (16 if HAS_NUMBA else 1)  # else this would show nothing of what is served
    for frame in range(5):
        lane.run([2], rows[frame : frame + 1])
    lane.run([0], rows[:1])
    for at in range(0, cut, frames):
        both = np.stack([rows[1 + at : 1 + at + frames], rows[at : at + frames]])
        lane.replay([0, 1], both, outputs=cut - at <= HEARD_FRAMES + frames)
    ends = [1 + -(-cut // frames) * frames, -(-cut // frames) * frames, 5]
    assert all(goes_on(lane, direction, slot, end) for slot, end in enumerate(ends))

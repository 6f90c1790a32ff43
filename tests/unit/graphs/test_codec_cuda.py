"""The codec's CUDA graphs on a device: bit for bit the operators that were captured, and beside other streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.setting import SHAPES, random_mimi
from graphs.codec import DecoderLane, EncoderLane
from graphs.codec_runners import StaticRunner
from models.config import FRAME_SAMPLES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLOTS = 8


def test_a_captured_frame_is_the_operators_bit_for_bit() -> None:
    """Random subsets of slots, a slot that is reset and one that moves meanwhile."""
    mimi = random_mimi(SHAPES["demo"][1], torch.device("cuda"))
    random = np.random.default_rng(0)
    captured = EncoderLane(mimi, SLOTS), DecoderLane(mimi, SLOTS)
    eager = EncoderLane(mimi, SLOTS, runner="torch"), DecoderLane(mimi, SLOTS, runner="torch")
    for lane in captured:
        assert isinstance(lane.runner, StaticRunner)
        assert lane.runner.captured
    for frame in range(30):
        slots = [int(slot) for slot in random.permutation(SLOTS) if random.random() < 0.7]
        pcm = random.integers(-8_000, 8_000, (len(slots), FRAME_SAMPLES)).astype(np.int16)
        codes = random.integers(0, 2_048, (len(slots), 8)).astype(np.int16)
        assert np.array_equal(captured[0].run(slots, pcm), eager[0].run(slots, pcm))
        assert np.array_equal(captured[1].run(slots, codes), eager[1].run(slots, codes))
        if frame % 10 == 5:
            for lane in (*captured, *eager):
                lane.reset(frame % SLOTS)
                lane.restore((frame + 1) % SLOTS, lane.snapshot((frame + 2) % SLOTS))


def test_both_directions_and_other_work_may_be_under_way_at_once() -> None:
    mimi = random_mimi(SHAPES["demo"][1], torch.device("cuda"))
    random = np.random.default_rng(1)
    together = EncoderLane(mimi, SLOTS), DecoderLane(mimi, SLOTS)
    in_turn = EncoderLane(mimi, SLOTS), DecoderLane(mimi, SLOTS)
    slots = list(range(SLOTS))
    other = torch.randn(2_048, 2_048, device="cuda")
    for _ in range(30):
        pcm = random.integers(-8_000, 8_000, (SLOTS, FRAME_SAMPLES)).astype(np.int16)
        codes = random.integers(0, 2_048, (SLOTS, 8)).astype(np.int16)
        heard, said = together[0].start(slots, pcm), together[1].start(slots, codes)
        other = torch.tanh(other @ other)
        assert np.array_equal(in_turn[0].run(slots, pcm), heard())
        assert np.array_equal(in_turn[1].run(slots, codes), said())

"""Real engine and codec behind a real replica: cut at any frame, rebuilt from a journal, the same tokens and samples.

The windows are so small that the language model's wraps four times in these frames and the codec's more often.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.interfaces import ReplicaSettings
from actors.journal import FRAMES_PER_S, Journal
from actors.messages import FrameIn, FrameOut, OpenRequest
from actors.replica import Replica
from actors.stage_build import build_decoder, build_encoder, build_engine
from actors.stage_config import StageConfig
from graphs.stages import FrameKey, SessionSpec
from tests.actor_fakes import Sink, Tokenizer
from tests.fake_clock import FakeClock, settle
from tests.small_checkpoint import LM, MIMI, write_small_checkpoint
from tests.stage_fakes import Handle

SLOTS, FRAMES, AFTER = 3, 170, 6
assert 4 * LM.context < FRAMES
_numbers = itertools.count()
SPEECH = np.random.default_rng(3).integers(-9000, 9000, (FRAMES, 1920)).astype(np.int16)


class Whole:
    """Stages that are loaded once; a replica on them for each conversation."""

    def __init__(self, folder: Path, anchor_s: float) -> None:
        config = StageConfig(str(folder), slots=SLOTS, anchor_s=anchor_s)
        self._stages = [build(config)[0] for build in (build_encoder, build_engine, build_decoder)]
        self.voice, self.anchored = "A", anchor_s > 0
        self._undisturbed: dict[int, list[FrameOut]] = {}

    def undisturbed(self, seed: int) -> list[FrameOut]:
        if seed not in self._undisturbed:
            self._undisturbed[seed] = asyncio.run(self._speak(seed, None, FRAMES))
        return self._undisturbed[seed]

    def rebuilt(self, seed: int, journal: Journal, slot: int) -> list[FrameOut]:
        return asyncio.run(self._speak(seed, journal, journal.next_frame + AFTER, slot))

    def spec(self, seed: int) -> SessionSpec:
        return SessionSpec(self.voice, "", seed)

    async def _speak(self, seed: int, journal: Journal | None, end: int, slot: int = 0) -> list[FrameOut]:
        for stage in self._stages:
            stage.clear()
        clock: Any = FakeClock()
        replica = Replica(
            *(Handle(stage) for stage in self._stages),
            slots=SLOTS,
            tokenizer=Tokenizer(),
            settings=ReplicaSettings(window_s=0.0, receptive_s=MIMI.receptive_frames / FRAMES_PER_S),
            clock=clock,
        )
        run, sink = asyncio.create_task(replica.run()), Sink()
        for _ in range(slot):  # a neighbour each, so that it comes into another slot
            await replica.open(OpenRequest(f"n{next(_numbers)}", 1, "t", "i", self.spec(99)), Sink())
        # Another name each time: the stages remember which epochs of a conversation are over.
        name = f"a{next(_numbers)}"
        if journal is not None:
            journal.session = name
        await replica.open(OpenRequest(name, 1, "t", "i", self.spec(seed)), sink, journal)
        while not sink.ready:
            await settle(5)
        for frame in range(sink.ready[0].next_frame, end):
            replica.offer(FrameIn(FrameKey(name, 1, frame), SPEECH[frame]))
            while len(sink.frames) <= frame - sink.ready[0].next_frame:
                await settle(1)
        await replica.stop()
        await run
        return sink.frames


@pytest.fixture(scope="module", params=[0.0, 2.0], ids=["sliding", "anchored"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    before = torch.get_num_threads()
    yield Whole(write_small_checkpoint(tmp_path_factory.mktemp("small")), request.param)
    torch.set_num_threads(before)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, FRAMES - AFTER), seed=st.sampled_from([5, 6]), slot=st.integers(0, SLOTS - 1))
def test_cut_anywhere(whole: Whole, cut: int, seed: int, slot: int) -> None:
    expected = whole.undisturbed(seed)
    journal = Journal("a", whole.spec(seed), MIMI.receptive_frames / FRAMES_PER_S)
    journal.begin("", 0, "")
    for frame in range(cut):
        journal.heard(frame, SPEECH[frame])
        journal.take(expected[frame])
    found = whole.rebuilt(seed, Journal.from_bytes(journal.to_bytes(), MIMI.receptive_frames / FRAMES_PER_S), slot)
    assert len(found) == AFTER
    for out, was in zip(found, expected[cut:], strict=False):
        assert (out.key.frame, out.text_token, out.codes.tolist()) == (
            was.key.frame,
            was.text_token,
            was.codes.tolist(),
        )
        assert np.array_equal(out.user_codes, was.user_codes)
        assert np.array_equal(out.pcm, was.pcm)
        assert np.array_equal(out.journal_row, was.journal_row)


def test_these_conversations_say_something(whole: Whole) -> None:
    """Or equality would mean little."""
    one, two = whole.undisturbed(5), whole.undisturbed(6)
    assert len({tuple(out.codes.tolist()) for out in one}) > FRAMES // 2
    assert any(not np.array_equal(a.codes, b.codes) for a, b in zip(one, two, strict=True))
    assert len({tuple(out.user_codes.tolist()) for out in one}) > FRAMES // 4
    assert (one[-1].first_row > 0) == whole.anchored

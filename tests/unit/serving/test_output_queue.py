"""The output queue: in order, bounded, and text outlives the audio that is dropped."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import FrameOut
from graphs.stages import FrameKey
from serving.output_queue import PATIENCE_FRAMES, CatchUp, OutputQueue


def frame(number: int, text: str = "") -> FrameOut:
    codes = np.zeros(8, dtype=np.int16)
    pcm = np.full(1920, number, dtype=np.int16)
    return FrameOut(FrameKey("s", 1, number), pcm, 3, text, codes, codes, np.zeros(17, dtype=np.int16), 1.0)


def test_a_reader_who_keeps_up_gets_everything() -> None:
    queue = OutputQueue(stale_frames=3, limit_frames=10)
    for number in range(50):
        queue.put(frame(number))
        taken = queue.take()
        assert taken is not None
        assert (taken.key.frame, taken.pcm[0]) == (number, number)
    assert (queue.take(), queue.behind, queue.dropped_frames) == (None, 0, 0)


def test_a_late_reader_loses_the_oldest_audio_and_no_text() -> None:
    queue = OutputQueue(stale_frames=3, limit_frames=10)
    for number in range(6):
        queue.put(frame(number, text="word" if number in (1, 4) else ""))
    taken = [out for _ in range(len(queue)) if (out := queue.take())]
    assert [(out.key.frame, out.text, len(out.pcm)) for out in taken] == [
        (1, "word", 0),
        (3, "", 1920),
        (4, "word", 1920),
        (5, "", 1920),
    ]
    assert queue.dropped_frames == 3
    assert not queue.overrun


def test_a_reader_beyond_the_limit_is_overrun() -> None:
    queue = OutputQueue(stale_frames=3, limit_frames=10)
    for number in range(10):
        queue.put(frame(number))
    assert not queue.overrun
    queue.put(frame(10))
    assert queue.overrun


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=120))
def test_order_text_and_bounds_hold_whatever_the_reader_does(steps: list[tuple[bool, bool]]) -> None:
    queue = OutputQueue(stale_frames=5, limit_frames=10_000)
    put: list[int] = []
    spoken: list[int] = []
    taken: list[int] = []
    texts: list[int] = []
    for number, (has_text, reads) in enumerate(steps):
        queue.put(frame(number, "w" if has_text else ""))
        put.append(number)
        if has_text:
            spoken.append(number)
        if reads and (out := queue.take()):
            taken.append(out.key.frame)
            texts += [out.key.frame] if out.text else []
    while out := queue.take():
        taken.append(out.key.frame)
        texts += [out.key.frame] if out.text else []
    assert taken == sorted(set(taken))
    assert texts == spoken
    assert len(put) - len(taken) <= queue.dropped_frames


def lags(catch_up: CatchUp, behind: Iterable[int]) -> list[bool]:
    return [catch_up.stale(each) for each in behind]


def test_what_is_caught_up_is_not_heard_until_the_lag_is_small_again() -> None:
    catch_up = CatchUp()
    assert not any(lags(catch_up, [0] * 25))
    catch_up.begin(40)
    assert lags(catch_up, range(39, 0, -1)) == [True] * 38 + [False]
    assert not catch_up.catching_up
    assert not any(lags(catch_up, [7] * 50))  # late for another reason: that is no recovery's business


def test_a_lag_that_is_usual_for_a_client_is_small_enough() -> None:
    catch_up = CatchUp()
    lags(catch_up, [3] * 25)
    catch_up.begin(10)
    assert lags(catch_up, [6, 5, 4, 3]) == [True, True, True, False]


def test_a_replica_that_only_just_keeps_up_does_not_silence_a_conversation() -> None:
    catch_up = CatchUp()
    catch_up.begin(60)
    assert lags(catch_up, [20] + [4] + [4] * 30) == [True] * (1 + PATIENCE_FRAMES) + [False] * (31 - PATIENCE_FRAMES)


def test_nothing_unanswered_is_nothing_to_catch_up() -> None:
    catch_up = CatchUp()
    catch_up.begin(0)
    assert not catch_up.catching_up

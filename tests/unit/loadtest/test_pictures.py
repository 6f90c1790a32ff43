from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadtest.pictures import Lane, spans, speaking, who_spoke_when
from loadtest.speech import RATE, Samples


def bursts(*seconds: tuple[float, float]) -> Samples:
    """Ten seconds of faint noise with a tone from a to b for each (a, b)."""
    pcm = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32) * 3e-4
    for start, stop in seconds:
        pcm[int(start * RATE) : int(stop * RATE)] += 0.2
    return pcm


def test_speech_is_found_and_short_pauses_belong_to_it() -> None:
    heard = spans(speaking(bursts((1.04, 2.0), (2.16, 3.04), (5.04, 6.0))))
    assert heard == [pytest.approx((1.04, 2.0)), pytest.approx((5.04, 0.96))]


def test_room_noise_is_silence() -> None:
    assert spans(speaking(bursts())) == []


def test_speech_to_the_very_end_has_an_end() -> None:
    assert spans(np.array([False, True, True])) == [pytest.approx((0.08, 0.16))]


def test_the_picture_shows_both_speakers(tmp_path: Path) -> None:
    lanes = [Lane(f"call {i}", "voice A", bursts((1, 3)), bursts((2, 5))) for i in range(2)]
    who_spoke_when(tmp_path / "out" / "who.png", lanes, "two calls")
    with Image.open(tmp_path / "out" / "who.png") as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    assert {(0x2A, 0x6F, 0x97), (0xD1, 0x66, 0x2F), (0x8A, 0x4F, 0x7D)} <= colours


def test_no_conversations_no_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no conversations"):
        who_spoke_when(tmp_path / "who.png", [], "nothing")

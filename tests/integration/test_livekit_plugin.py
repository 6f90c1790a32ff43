"""LiveKit's PersonaPlex plugin, unmodified and in an environment of its own, holds conversations with /api/chat.

Here the replica is an echo, so that what the plugin hears can be compared with what it said; against the whole
system it talks in test_whole_system.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.chat_fakes import EchoServer, EchoTrunk, served
from tests.livekit.plugin import NOT_SET_UP, SET_UP, converse

pytestmark = pytest.mark.skipif(not SET_UP, reason=NOT_SET_UP)


def speech(path: Path, seconds: float, rate: int = 48_000) -> Path:
    """A tone in bursts: 1.5 s of sound, 1.5 s of silence."""
    t = np.arange(int(seconds * rate)) / rate
    burst = (t % 3.0) < 1.5
    soundfile.write(path, (9000 * np.sin(2 * np.pi * 300 * t) * burst).astype(np.int16), rate)
    return path


async def test_it_talks_and_hears_everything(tmp_path: Path) -> None:
    server = EchoServer(trunk=EchoTrunk(prompt_s=0.3, answer_s=0.05))
    wav = speech(tmp_path / "speech.wav", 4)
    async with served(server) as url:
        came = await converse(
            url, wav, "--seconds", "4", "--voice", "NATM0", "--role", "Be kind & brief.", "--seed", "3"
        )
    assert came["errors"] == []
    assert came["reconnects"] == 0
    assert came["generations"] == 1
    assert came["heard_s"] == pytest.approx(came["said_s"], abs=0.25)  # the plugin keeps what does not fill its 80 ms
    assert 6000 < came["peak"] < 14_000
    assert came["words"].startswith(" hello there, friend")
    (opened,) = server.trunk.opened
    assert (opened.spec.voice, opened.spec.role, opened.spec.seed) == ("NATM0.pt", "Be kind & brief.", 3)
    assert not server.router.held


async def test_it_comes_back_after_a_refusal(tmp_path: Path) -> None:
    """What it sends first is then the tail of its old stream, without headers: no reason to hang up on it."""
    server = EchoServer(slots=0)
    wav = speech(tmp_path / "speech.wav", 5)
    async with served(server) as url:
        talking = asyncio.create_task(converse(url, wav, "--seconds", "5"))
        async with asyncio.timeout(30):
            await server.router.refused.wait()
        server.router.slots = 1
        came = await talking
    assert len(came["errors"]) == 1
    assert came["heard_s"] > 2.0
    assert server.router.granted == 1

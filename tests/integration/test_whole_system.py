"""The whole system, started as a user starts it, and what talks to it: page, LiveKit's plugin, callers, load test.

The model has random weights, so what is said is not looked at; that it is said, in time, and the same again, is.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.browser import find_chromium, open_page
from tests.livekit.plugin import NOT_SET_UP, SET_UP, converse
from tests.real_server import Caller, call, serve

SLOTS = 4
LOADTEST = (sys.executable, "-m", "serving.cli.main", "loadtest")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(slots=SLOTS) as url:
        yield url


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds of something between a voice and a siren, 48 kHz."""
    t = np.arange(6 * 48_000) / 48_000
    pcm = 7000 * np.sin(2 * np.pi * (180 * t + 40 * np.sin(3 * t))) * (np.sin(5 * t) > -0.3)
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    soundfile.write(path, pcm.astype(np.int16), 48_000)
    return path


async def held(server: str, pcm: np.ndarray, **query: str | int) -> Caller:
    """A conversation over this audio, to its end."""
    async with call(server, **query) as caller:
        await caller.ready()
        await caller.speak(len(pcm) // 1920, pcm)
    return caller


async def test_a_seed_says_the_same_alone_and_among_others(server: str, speech: Path) -> None:
    pcm = soundfile.read(speech, dtype="int16")[0][: 1920 * 40]
    mine = {"seed": 5, "voice_prompt": "NATM1", "text_prompt": "You enjoy having a good conversation."}
    alone = await held(server, pcm, **mine)
    others = [held(server, pcm[::-1].copy(), seed=seed, text_prompt="Be brief. " * seed) for seed in (6, 7, 8)]
    among, *rest = await asyncio.gather(held(server, pcm, **mine), *others)
    assert len(alone.audio) == len(among.audio) == 40
    assert among.audio == alone.audio
    assert among.words == alone.words
    assert {other.audio[-1] for other in rest}.isdisjoint(alone.audio[-1:])


async def test_opus_lasts_as_long_as_what_was_said(server: str) -> None:
    """Through sphn, as Kyutai's and LiveKit's clients: frames in, as many samples out."""
    import sphn

    writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    async with call(server, audio="opus") as caller:
        await caller.ready()
        for _ in range(25):
            await caller.socket.send(b"\x01" + writer.append_pcm(np.zeros(1920, dtype=np.float32)))
        async with asyncio.timeout(60):
            while len(caller.audio) < 25:
                await caller.take()
    assert sum(len(reader.append_bytes(message)) for message in caller.audio) == 25 * 1920


async def test_restart_takes_a_new_slot_and_begins_again(server: str, speech: Path) -> None:
    pcm = soundfile.read(speech, dtype="int16")[0][: 1920 * 10]
    async with call(server, seed=9) as caller:
        await caller.ready()
        await caller.speak(10, pcm)
        first = caller.audio
        caller.audio, caller.metadata = [], {}
        await caller.socket.send(b"\x03\x03")
        await caller.ready()
        await caller.speak(10, pcm)
    assert caller.audio == first


def test_a_load_test_says_who_was_held_and_who_was_refused(server: str) -> None:
    """`personaplex loadtest`, as a user runs it, with a caller more than there are slots."""
    command = [*LOADTEST, server, "--sessions", f"{SLOTS + 1}", "--seconds", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    printed = json.loads(done.stdout)
    # The last waits for a slot for a second and is told that there is none. How late a busy machine makes the
    # generator is not what is tested; that it says so is.
    assert done.returncode == (1 if printed["valid"] else 3), done.stderr
    assert printed["sessions"] == SLOTS + 1
    assert printed["refusals"] == {"1013": 1}
    assert printed["closes"] == {}
    # Calls of 4 s and more, 12.5 frames each second, less the first which has to be spoken, and what a machine with
    # other work has not answered by then.
    assert SLOTS * 12.5 * 1 < printed["frames"] < SLOTS * 12.5 * 4.5
    assert 20 < printed["frame_gap_ms"]["p50"] < 400
    assert 0 < printed["ready_ms"] < printed["first_audio_ms"]
    assert "slots" in done.stderr


@pytest.mark.skipif(not SET_UP, reason=NOT_SET_UP)
async def test_livekits_plugin_holds_a_conversation(server: str, speech: Path) -> None:
    came = await converse(server, speech, "--seconds", "6", "--voice", "NATF2")
    assert came["errors"] == []
    assert came["reconnects"] == 0
    assert came["heard_s"] == pytest.approx(6.0, abs=0.25)
    assert came["peak"] > 100
    assert came["words"]
    assert came["first_audio_s"] < 6.0, "while it was still speaking"


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")
async def test_the_page_holds_a_conversation(server: str, speech: Path) -> None:
    chromium = find_chromium()
    assert chromium is not None
    async with open_page(chromium, speech) as page:
        await page.look(width=1200, height=900)
        await page.open(server)
        await page.until("!document.getElementById('voice').disabled")
        assert await page.run("document.getElementById('untrained').checkVisibility()")
        assert await page.run("document.getElementById('voice').options.length") > 3
        for sound in ("pcm", "opus"):
            await page.run(f"document.getElementById('sound').value = '{sound}'")
            await page.run("document.getElementById('talk').click()")
            await page.until("document.getElementById('status').dataset.state === 'live'")
            await page.until("document.getElementById('said').querySelector('p time')")  # it has said a word
            await page.until("document.getElementById('lag').textContent.endsWith('ms')")
            await page.run("document.getElementById('talk').click()")
            await page.until("document.getElementById('status').dataset.state === 'idle'")
        assert not page.complaints

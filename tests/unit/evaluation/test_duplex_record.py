"""Held conversations: a real socket, a small agent behind it, and everything on the caller's clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import soundfile
import sphn
from websockets.asyncio.server import ServerConnection, serve

from evaluation.duplex.items import Cue, Line
from evaluation.duplex.record import NotLive, lag, record
from evaluation.duplex.recording import CONVERSATION, RECORDING, Recording, read_recording
from evaluation.duplex.user import FRAME_S, FRAME_SAMPLES, RATE
from loadtest.chat_client import Refused
from tests.unit.evaluation.duplex_items import item, piece, tone, turn, write
from tests.virtual_time import in_virtual_time

WORD_AT = 30  # the frame with which a word comes


class Agent:
    """Answers frame for frame over /api/chat, with sound in some frames and one word. `busy` calls are refused."""

    def __init__(self, busy: int = 0, sounds: range = range(25, 60)) -> None:
        self.busy, self.sounds = busy, sounds
        self.asked: list[str] = []

    async def talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.asked.append(connection.request.path)
        if len(self.asked) <= self.busy:
            await connection.send(b"\x05no slot is free")
            await connection.close(1013)
            return
        await connection.send(b"\x00\x00\x00")
        await connection.send(b'\x04{"lm_model_file": "test", "trained": true, "pad_mult": 0}')
        ear, voice = sphn.OpusStreamReader(RATE), sphn.OpusStreamWriter(RATE)
        heard = frame = 0
        async for message in connection:
            assert isinstance(message, bytes)
            heard += len(ear.append_bytes(message[1:]))
            while frame < heard // FRAME_SAMPLES:
                sound = tone(FRAME_SAMPLES) if frame in self.sounds else np.zeros(FRAME_SAMPLES, dtype=np.float32)
                await connection.send(b"\x01" + bytes(voice.append_pcm(sound)))
                if frame == WORD_AT:
                    await connection.send(b"\x02 hello")
                frame += 1


@asynccontextmanager
async def served(agent: Agent) -> AsyncIterator[str]:
    async with serve(agent.talk, "127.0.0.1", 0, compression=None) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


# One line from 0.4 to 1.36 s; the agent sounds from 2.0 to 4.8 s and is broken into.
WAIT = Line("interruption", Cue("agent_speaks", 0.8), (piece(1, "wait"),))
ITEM = item(turn(0, Cue("user", 0.4)), WAIT)

# One line to 1.04 s, and an agent that answers at once, so that the user hangs up after three seconds.
BRIEF, SOON = item(turn(0, Cue("user", 0.08))), range(14, 20)


@in_virtual_time
async def test_the_user_reacts_and_both_are_recorded_on_one_clock(tmp_path: Path) -> None:
    folder, agent, seconds = write(tmp_path / "a", ITEM), Agent(), list[float]()
    async with served(agent) as url:
        recording = await record(url, folder, clock=asyncio.get_running_loop().time, on_second=seconds.append)
    query = parse_qs(urlsplit(agent.asked[0]).query)
    assert (query["voice_prompt"], query["seed"], query["text_prompt"]) == (["NATF0"], ["7"], [ITEM.prompt])
    assert recording == read_recording(folder)
    assert recording.metadata == {"lm_model_file": "test", "trained": True}
    assert [entry.outcome for entry in recording.spoken] == ["said", "said"]
    assert recording.spoken[0].at_s == pytest.approx(0.4)
    # The agent is heard from 2.0 s and the lag on; after 0.8 s of it, and the frame already under way, the user speaks.
    assert recording.spoken[1].at_s == pytest.approx(2.8 + recording.lag_s, abs=0.09)
    assert recording.lag_s == pytest.approx(FRAME_S, abs=0.001)
    assert recording.stalls == ()
    assert len(seconds) * FRAME_S == pytest.approx(recording.seconds)

    sound, rate = soundfile.read(folder / CONVERSATION)
    assert (rate, sound.shape) == (RATE, (round(recording.seconds * RATE), 2))
    user, said = (np.flatnonzero(np.abs(sound[:, channel]) > 0.05) / RATE for channel in (0, 1))
    assert user[0] == pytest.approx(0.4, abs=0.02)
    assert said[0] == pytest.approx(25 * FRAME_S + recording.lag_s, abs=0.03)
    assert said[-1] == pytest.approx(60 * FRAME_S + recording.lag_s, abs=0.03)
    [(word_s, text)] = recording.text
    assert (word_s, text) == (pytest.approx(WORD_AT * FRAME_S + recording.lag_s, abs=0.005), " hello")


@in_virtual_time
async def test_a_server_without_a_free_slot_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, agent = write(tmp_path / "a", BRIEF), Agent(2, SOON)
    async with served(agent) as url:
        await record(url, folder, clock=asyncio.get_running_loop().time)
    assert len(agent.asked) == 3


@in_virtual_time
async def test_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, agent = write(tmp_path / "a", ITEM), Agent(busy=100)
    async with served(agent) as url:
        with pytest.raises(Refused, match="no slot is free"):
            await record(url, folder, clock=asyncio.get_running_loop().time)
    assert not (folder / RECORDING).exists()


class TestLag:
    DUE = tuple((frame + 1) * FRAME_S for frame in range(200))

    def test_is_from_the_frames_beginning_to_hearing_the_answer(self) -> None:
        assert lag(self.DUE, [due + 0.05 for due in self.DUE]) == (pytest.approx(0.13), [])

    def test_a_late_frame_is_jitter(self) -> None:
        heard = [due + (1.0 if frame == 50 else 0.05) for frame, due in enumerate(self.DUE)]
        assert lag(self.DUE, heard)[1] == []

    def test_a_server_that_falls_behind_is_noticed(self) -> None:
        heard = [due + 0.05 + 0.005 * frame for frame, due in enumerate(self.DUE)]
        first, last = lag(self.DUE, heard)[1]
        # The lag goes from 50 to 1,045 ms; for half of the call it is more than 250 ms off the median.
        assert (first[0], last[1]) == (0.0, pytest.approx(16.0))
        assert first[1] == pytest.approx(5.0, abs=1.1)

    def test_a_stall_is_where_it_was(self) -> None:
        heard = [due + (0.6 if 100 <= frame < 120 else 0.05) for frame, due in enumerate(self.DUE)]
        [(start_s, end_s)] = lag(self.DUE, heard)[1]
        assert start_s <= 8.0 <= 9.6 <= end_s
        assert end_s - start_s < 1.6 + 2 * 2.0

    def test_lost_frames_are_noticed(self) -> None:
        heard = [due + 0.05 for due in (*self.DUE[:120], *self.DUE[130:])]
        [(start_s, end_s)] = lag(self.DUE, heard)[1]
        assert (start_s, end_s) == (pytest.approx(120 * FRAME_S, abs=1.1), pytest.approx(190 * FRAME_S))

    def test_nothing_heard_is_nothing_measured(self) -> None:
        with pytest.raises(NotLive, match="nothing was heard"):
            lag(self.DUE, [])


@in_virtual_time
async def test_a_conversation_that_was_not_live_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.duplex.record.lag", lambda due_s, heard_s: (0.2, [(0.0, 2.0)]))
    folder = write(tmp_path / "a", BRIEF)
    async with served(Agent(0, SOON)) as url:
        with pytest.raises(NotLive, match="fewer --sessions"):
            await asyncio.wait_for(record(url, folder, clock=asyncio.get_running_loop().time), 30)
    assert not (folder / RECORDING).exists()
    assert not (folder / CONVERSATION).exists()


def test_a_recordings_json_is_read_again() -> None:
    made = Recording((), ((0.5, " a"),), 3.0, 0.1, ((1.0, 2.0),), {"trained": True})
    assert Recording.from_json(made.to_json()) == made

"""/api/chat's handler over the real hub and an echo for a replica: what is said, what is refused, what is freed."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import pytest
import sphn

from actors.errors import from_code
from graphs.stages import Sampling
from serving.audio.payload import OpusPayloadEncoder
from serving.tenants import Tenants
from tests.chat_fakes import EchoServer, EchoTrunk
from tests.virtual_time import in_virtual_time

FRAME = np.arange(1920, dtype=np.int16)
PCM = {"audio": "pcm"}


def said(pcm: np.ndarray = FRAME) -> bytes:
    return b"\x01" + pcm.astype("<i2").tobytes()


def opus_frames(frames: int) -> list[bytes]:
    """Messages of 80 ms of a tone each."""
    encoder = OpusPayloadEncoder()
    pcm = (8000 * np.sin(np.arange(1920 * frames) * 0.05)).astype(np.int16).reshape(frames, 1920)
    return [b"\x01" + encoder.encode(row) for row in pcm]


async def test_a_conversation_in_opus() -> None:
    server = EchoServer()
    async with server.call({"voice_prompt": "NATF2.pt", "text_prompt": "Be kind.", "seed": "7"}) as client:
        metadata = await client.live()
        assert (metadata["voice"], metadata["seed"], metadata["trained"]) == ("NATF2.pt", "7", False)
        assert len(server.router.held) == 1
        for message in opus_frames(10):
            client.say(message)
        reader = sphn.OpusStreamReader(24_000)
        heard = [len(reader.append_bytes(await client.hear_kind(1))) for _ in range(10)]
        assert heard == [1920] * 10
        assert await client.hear_kind(2) == b" there"
    (opened,) = server.trunk.opened
    assert (opened.spec.voice, opened.spec.role, opened.spec.seed) == ("NATF2.pt", "Be kind.", 7)
    assert opened.spec.sampling == Sampling()


async def test_who_names_no_temperature_gets_what_the_checkpoint_recommends() -> None:
    server = EchoServer(sampling=Sampling(0.4, 25, 0.6, 250))
    async with server.call(PCM) as client:
        told = await client.live()
    async with server.call(PCM | {"audio_temperature": "0.9"}) as client:
        await client.live()
    silent, wilful = (spec.sampling for spec in (opened.spec for opened in server.trunk.opened))
    assert silent == Sampling(0.4, 25, 0.6, 250)
    assert wilful == Sampling(0.4, 25, 0.9, 250)
    assert (told["text_temperature"], told["audio_temperature"]) == (0.4, 0.6)


async def test_audio_comes_before_its_text() -> None:
    server = EchoServer()
    async with server.call(PCM) as client:
        await client.live()
        for _ in range(5):
            client.say(said())
        assert [(await client.hear())["bytes"][0] for _ in range(6)] == [1, 1, 1, 1, 1, 2]


async def test_pcm_goes_through_untouched() -> None:
    async with EchoServer().call(PCM) as client:
        assert (await client.live())["audio"] == "pcm"
        client.say(said()[:1001])
        client.say(b"\x01" + said()[1001:])
        assert await client.hear_kind(1) == said()[1:]


async def test_what_was_said_before_the_prompt_was_in_is_heard() -> None:
    server = EchoServer(trunk=EchoTrunk(prompt_s=0.05))
    async with server.call() as client:
        for message in opus_frames(8):
            client.say(message)
        await client.live()
        for _ in range(8):
            await client.hear_kind(1)


@in_virtual_time
async def test_what_was_said_meanwhile_is_no_delay_for_the_rest_of_the_call() -> None:
    """LiveKit's plugin keeps its audio back until the prompt is in, and then sends it in one go."""
    server = EchoServer(trunk=EchoTrunk(prompt_s=1.0))
    async with server.call(PCM) as client:
        await client.live()
        started_s = asyncio.get_running_loop().time()
        for _ in range(12):
            client.say(said())
        for _ in range(12):
            await client.hear_kind(1)
        assert asyncio.get_running_loop().time() - started_s < 0.3  # 0.56 at the pace of a microphone


async def test_ping_is_answered_even_while_the_prompt_is_built() -> None:
    async with EchoServer(trunk=EchoTrunk(prompt_s=0.05)).call() as client:
        client.say(b"\x06abc")
        assert await client.hear_kind(6) == b"abc"


async def test_what_is_not_applied_is_told_once() -> None:
    async with EchoServer().call({"email": "a@b.c", "pad_mult": "1"}) as client:
        assert (await client.live())["not_applied"] == ["email", "pad_mult"]
        client.say(b"\x02hello")
        client.say(b"\x02hello")
        client.say(b"\x06end")
        assert await client.hear_kind(4) == b'{"not_applied": ["text"]}'
        assert (await client.hear())["bytes"] == b"\x06end"


async def test_end_turn_fills_up_with_silence() -> None:
    async with EchoServer().call(PCM) as client:
        await client.live()
        client.say(said(FRAME[:100]))
        client.say(b"\x03\x01")
        heard = np.frombuffer(await client.hear_kind(1), dtype="<i2")
        assert np.array_equal(heard[:100], FRAME[:100])
        assert not heard[100:].any()


async def test_pause_stops_the_clock_and_start_goes_on() -> None:
    async with EchoServer().call(PCM) as client:
        await client.live()
        client.say(b"\x03\x02")
        client.say(said(FRAME * 0))
        client.say(b"\x03\x00")
        client.say(said())
        assert await client.hear_kind(1) == said()[1:]


async def test_restart_is_the_same_conversation_from_its_beginning_even_in_a_full_house() -> None:
    server = EchoServer(slots=1)
    async with server.call() as client:
        first = await client.live()
        for message in opus_frames(3):
            client.say(message)
        await client.hear_kind(1)
        client.say(b"\x03\x03")
        await client.hear_kind(0)
        assert len(server.router.held) == 1
    assert server.router.granted == 2
    one, two = server.trunk.opened
    assert one.spec == two.spec
    assert one.session != two.session
    assert str(one.spec.seed) == first["seed"]


async def test_silence_gate_leaves_silence_out() -> None:
    async with EchoServer().call({**PCM, "silence_gate": "1"}) as client:
        await client.live()
        quiet, loud = np.zeros(1920, np.int16), np.full(1920, 3000, np.int16)
        for pcm in (quiet, loud, quiet, quiet, quiet, quiet, loud):
            client.say(said(pcm))
        heard = [np.frombuffer(await client.hear_kind(1), dtype="<i2")[0] for _ in range(5)]
        assert heard == [3000, 0, 0, 0, 3000]


# Refused before a slot is taken


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ({"seed": "banana"}, "seed is a whole number"),
        ({"text_prompt": "x" * 100_000}, "100000 characters"),
        ({"voice_prompt": "NOBODY"}, "no voice"),
        ({"voice_prompt": "../../etc/passwd"}, "no voice"),
        ({"voice_prompt": "../NATF2.pt"}, "no voice"),
        ({"audio": "mp3"}, "opus or pcm"),
        ({"audio_topk": "0"}, "audio_topk"),
    ],
)
async def test_a_bad_query_never_takes_a_slot(query: dict[str, str], word: str) -> None:
    server = EchoServer()
    async with server.call(query) as client:
        sentence, code = await client.refusal()
    assert word in sentence
    assert code == 1008
    assert server.router.granted == 0


async def test_no_slot_left() -> None:
    server = EchoServer(slots=1)
    async with server.call() as first:
        await first.live()
        second_call = server.call()
        second = await second_call.__aenter__()
        sentence, code = await second.refusal()
        assert code == 1013
        assert "slot" in sentence
        for message in opus_frames(2):  # the first one did not notice
            first.say(message)
        await first.hear_kind(1)


async def test_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    digest = hashlib.sha256(b"open sesame").hexdigest()
    keys.write_text(f'[[tenants]]\nname = "ali"\nmax_conversations = 1\nkeys = ["sha256:{digest}"]\n')
    server = EchoServer(tenants=Tenants.load(keys))
    for query, headers in (({}, {}), ({"api_key": "wrong"}, {}), ({}, {"Authorization": "Bearer wrong"})):
        async with server.call(query, headers) as client:
            assert (await client.refusal())[1] == 1008
    assert server.router.granted == 0
    async with server.call({"api_key": "open sesame"}) as client:
        await client.live()
    async with server.call({}, {"Authorization": "Bearer open sesame"}) as client:
        await client.live()
        second = await server.call({"api_key": "open sesame"}).__aenter__()
        assert (await second.refusal())[1] == 1008


# Ended while it runs


@pytest.mark.parametrize(
    ("message", "code", "word"),
    [
        ("hello", 1003, "text frames"),
        (b"", 1007, "no kind"),
        (b"\x09", 1003, "kind 9"),
        (b"\x03\x09", 1007, "control"),
        (b"\x01" + bytes(1 << 20), 1009, "longer"),
        (b"\x01" + bytes(100), 1007, "Ogg"),
        (opus_frames(1)[0][:-20] + opus_frames(2)[1], 1007, "truncated or corrupt"),
    ],
)
async def test_bad_messages_end_the_conversation(message: bytes | str, code: int, word: str) -> None:
    server = EchoServer()
    async with server.call() as client:
        await client.live()
        client.say(message)
        sentence, closed = await client.refusal()
    assert closed == code
    assert word in sentence


async def test_half_a_sample_of_pcm() -> None:
    async with EchoServer().call(PCM) as client:
        await client.live()
        client.say(b"\x01abc")
        assert (await client.refusal())[1] == 1007


async def test_a_client_that_says_nothing() -> None:
    async with EchoServer(idle_timeout_s=0.05).call() as client:
        await client.live()
        sentence, code = await client.refusal()
        assert code == 1008
        assert "No audio came" in sentence


async def test_a_page_that_never_ends_is_named_when_the_client_falls_silent() -> None:
    async with EchoServer(idle_timeout_s=0.05).call() as client:
        await client.live()
        client.say(opus_frames(1)[0][:-20])
        sentence, code = await client.refusal()
        assert code == 1008
        assert "Ogg page is incomplete" in sentence


async def test_a_client_that_stops_reading() -> None:
    server = EchoServer(stalled_client_s=0.05)
    async with server.call(PCM) as client:
        await client.live()
        client.reads.clear()
        client.say(said())
        await server.router.until_held(0)
        client.reads.set()
        assert (await client.refusal())[1] == 1008


@pytest.mark.parametrize("message", [None, opus_frames(1)[0][:50]])
async def test_a_client_that_vanishes(message: bytes | None) -> None:
    server = EchoServer()
    async with server.call() as client:
        await client.live()
        if message is not None:
            client.say(message)
        client.vanish()
        await client.ended()
        await server.hub.close()
        assert not server.router.held


async def test_a_client_that_vanishes_while_its_prompt_is_built() -> None:
    server = EchoServer(trunk=EchoTrunk(prompt_s=60))
    async with server.call() as client:
        await client.hear()
        await server.router.until_held(1)
        client.vanish()
        await client.ended()
        await server.hub.close()
        assert not server.router.held


@pytest.mark.parametrize(
    ("code", "closed"), [("engine_lost", 1011), ("draining", 1012), ("bad_request", 1008), ("from_the_future", 1011)]
)
async def test_it_fails(code: str, closed: int) -> None:
    server = EchoServer()
    async with server.call() as client:
        await client.live()
        for conversation in server.hub.conversations:
            conversation.fail(from_code(code, "The engine is gone."))
        sentence, got = await client.refusal()
    assert got == closed
    assert "The engine is gone." in sentence


async def test_an_engine_that_dies_is_not_the_clients_business() -> None:
    server = EchoServer()
    async with server.call(PCM) as client:
        await client.live()
        server.trunk.fail("engine_lost", "The engine is gone.")
        client.say(said())
        assert await client.hear_kind(1) == said()[1:]
    assert server.router.granted == 2


async def test_a_fault_of_ours_is_told_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    server = EchoServer()
    server.router.acquire = None  # type: ignore[assignment, method-assign]  # a bug, for once
    async with server.call() as client:
        sentence, code = await client.refusal()
    assert code == 1011
    assert "NoneType" not in sentence
    assert "ended by a fault" in caplog.text


async def test_a_message_of_minutes_neither_blocks_pings_nor_is_heard_faster_than_real_time() -> None:
    server = EchoServer()
    async with server.call() as client:
        await client.live()
        client.say(b"\x01" + b"".join(message[1:] for message in opus_frames(750)))
        client.say(b"\x06now")
        await client.hear_kind(6)
        assert len(server.trunk.heard) < 40

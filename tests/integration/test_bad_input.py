"""Bad input against the whole system: each gets its one clear answer, no slot is lost, nobody else hears of it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from itertools import pairwise

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from loadtest.chaos.pulse import Pulse
from serving.audio.payload import OpusPayloadEncoder
from tests.real_server import SILENCE, Caller, call, serve

SLOTS = 3
IDLE_S = 6
LONGEST_GAP_S = 0.4  # between two frames of a bystander; the page's playback buffer bridges a third of it


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(slots=SLOTS, idle_timeout_s=IDLE_S, stalled_client_s=2) as url:
        yield url


@pytest.fixture
async def bystander(server: str) -> AsyncIterator[Caller]:
    """Somebody else's conversation, going on all the while. Afterwards: no frame of it missing, none late, and every
    slot free again."""
    async with call(server, seed=1) as other:
        await other.ready()
        sent = 0
        over = asyncio.Event()

        async def talk() -> None:
            nonlocal sent
            while not over.is_set():
                await other.speak(12)
                sent += 12

        pulse = Pulse()
        talking, beating = asyncio.create_task(talk()), asyncio.create_task(pulse.beat())
        try:
            yield other
        finally:
            over.set()
            await talking
            beating.cancel()
        assert len(other.audio) == sent
        # The first frames after a start may wait for a neighbour's start; and what this process was asleep for itself,
        # or had to do with what it sends, is not the server's.
        heard_s = list(pairwise(other.arrivals_s[5:]))
        gaps = [b - a - sum(stall.within_s(a, b) for stall in pulse.stalls) for a, b in heard_s]
        print(f"longest gap {max(gaps, default=0):.3f} s")
        assert max(gaps, default=0) < LONGEST_GAP_S, f"a gap of {max(gaps):.2f} s"
    await busy_slots(server, 0)


async def busy_slots(server: str, wanted: int, within_s: float = 60.0) -> None:
    """Wait until so many slots are taken."""
    async with asyncio.timeout(within_s), httpx.AsyncClient() as client:
        while (await client.get(f"{server}/readyz")).json()["busy"] != wanted:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)


async def every_slot_is_free(server: str) -> None:
    """As many conversations as there are slots, and not one more."""
    async with asyncio.timeout(120), AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await _until_admitted(server, stack)
        one_too_many = await stack.enter_async_context(call(server))
        code, error = await one_too_many.closed()
        assert code == 1013
        assert error


async def _until_admitted(server: str, stack: AsyncExitStack) -> None:
    """A slot that was given up is on its way back to the router for a moment."""
    while True:
        caller = await stack.enter_async_context(call(server))
        try:
            await caller.ready()
            return
        except ConnectionClosed as refused:
            if refused.rcvd is None or refused.rcvd.code != 1013:
                raise
        await asyncio.sleep(0.1)


def opus(frames: int) -> list[bytes]:
    encoder = OpusPayloadEncoder()
    return [b"\x01" + encoder.encode(np.zeros(1920, dtype=np.int16)) for _ in range(frames)]


@pytest.mark.usefixtures("bystander")
class TestWhileSomebodyElseTalks:
    @pytest.mark.parametrize(
        ("query", "word"),
        [
            ({"voice_prompt": "NOBODY"}, "voice"),
            ({"voice_prompt": "../../../etc/passwd"}, "voice"),
            ({"voice_prompt": "../NATF0.pt"}, "voice"),
            ({"seed": "banana"}, "seed"),
            ({"text_prompt": "x" * 5000}, "role"),
            ({"audio_topk": "100000"}, "audio_topk"),
        ],
    )
    async def test_a_bad_query(self, server: str, query: dict[str, str], word: str) -> None:
        async with call(server, **query) as caller:
            code, error = await caller.closed()
        assert code == 1008
        assert error is not None
        assert word in error

    async def test_the_longest_role_in_any_script(self, server: str) -> None:
        """Percent-encoded it is nine times as long, and has to pass every limit on a request's head."""
        async with call(server, text_prompt="한" * 100) as caller:
            await caller.ready()
        async with call(server, text_prompt="한" * 4001) as caller:
            code, error = await caller.closed()
        assert code == 1008
        assert error is not None
        assert "4001 characters" in error

    async def test_a_role_of_100_000_characters(self, server: str) -> None:
        """Too long for the HTTP server's own limit on a request's head; whichever of the two is met first says no."""
        status = None
        try:
            async with call(server, text_prompt="x" * 100_000) as caller:
                code, error = await caller.closed()
        except InvalidStatus as refusal:
            status = refusal.response.status_code
        if status is not None:
            assert status in (400, 414, 431)
        else:
            assert code == 1008
            assert error is not None
            assert "100000" in error

    @pytest.mark.parametrize(
        ("message", "codes"),
        [
            ("hello", {1003}),
            (b"", {1007}),
            (b"\x09what", {1003}),
            (b"\x03\x09", {1007}),
            (b"\x01" + bytes(1 << 20), {1009}),
            (b"\x01" + bytes(20_000_000), {1009}),
        ],
        ids=["text", "empty", "unknown kind", "unknown control", "1 MiB", "20 MB"],
    )
    async def test_a_bad_message(self, server: str, message: bytes | str, codes: set[int]) -> None:
        async with call(server) as caller:
            await caller.ready()
            with suppress(ConnectionClosed):  # it may be refused before it was sent to its end
                await caller.socket.send(message)
            code, error = await caller.closed()
        assert code in codes
        assert error or len(message) > 1 << 24  # beyond 16 MiB the HTTP server itself hangs up

    async def test_a_truncated_page(self, server: str) -> None:
        first, second, third = opus(3)
        async with call(server, audio="opus") as caller:
            await caller.ready()
            await caller.socket.send(first)
            await caller.socket.send(second[:-15])
            await caller.socket.send(third)
            code, error = await caller.closed()
        assert code == 1007
        assert error is not None
        assert "truncated" in error

    async def test_a_client_that_says_nothing(self, server: str) -> None:
        async with call(server) as caller:
            await caller.ready()
            code, error = await caller.closed(IDLE_S + 60)
        assert code == 1008
        assert error is not None
        assert "No audio" in error

    async def test_a_client_that_stops_reading(self, server: str) -> None:
        """Its own pings come back to it until every buffer on the way is full; then a write of ours hangs."""
        async with call(server) as caller:
            await caller.ready()
            caller.socket.transport.pause_reading()
            shouting = asyncio.create_task(self._shout(caller))
            await busy_slots(server, 1)
            shouting.cancel()
            await asyncio.gather(shouting, return_exceptions=True)
            caller.socket.transport.abort()

    async def _shout(self, caller: Caller) -> None:
        while True:
            await caller.socket.send(b"\x06" + bytes(200_000))
            await caller.socket.send(SILENCE)

    async def test_a_client_that_vanishes_mid_frame(self, server: str) -> None:
        async with call(server) as caller:
            await caller.ready()
            await caller.speak(3)
            # The head of a frame that promises 3,841 bytes, ten of them, and then a reset.
            caller.socket.transport.write(b"\x82\xfe\x0f\x01" + bytes(4) + b"\x01" + bytes(9))
            raw = caller.socket.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.socket.transport.abort()

    async def test_a_client_that_vanishes_while_its_prompt_is_built(self, server: str) -> None:
        async with call(server, text_prompt="a long role " * 100) as caller:
            caller.socket.transport.abort()


async def test_no_slot_is_left_for_one_too_many(server: str) -> None:
    await every_slot_is_free(server)

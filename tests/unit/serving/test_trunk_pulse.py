"""Finding a trunk's other end dead: with the socket full as well, and never for want of a processor of our own."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from websockets.asyncio.server import ServerConnection, serve

from actors.messages import Down, Failed, FrameIn, OpenRequest
from graphs.stages import FrameKey, SessionSpec
from serving import trunk_protocol as wire
from serving.trunk_client import Trunk
from serving.trunk_pulse import Silence
from serving.trunk_server import TrunkConfig, TrunkServer
from tests.unit.serving.test_trunk import EchoReplica
from tests.virtual_time import in_virtual_time

PCM = np.zeros(1920, dtype=np.int16)
CONFIG = TrunkConfig(secret="a secret of the tests", ping_s=0.05, dead_s=0.3)


def looks(silence: Silence, times_s: list[float], heard: list[int]) -> list[bool]:
    return [silence.look(count, at_s) for count, at_s in zip(heard, times_s, strict=True)]


def test_silence_is_death_after_dead_s() -> None:
    every_s = Silence(0.9).look_every_s
    times = [index * every_s for index in range(12)]
    assert looks(Silence(0.9), times, [5] * 12).index(True) == 9
    assert not any(looks(Silence(0.9), times, list(range(12))))


def test_what_is_heard_in_between_begins_the_count_anew() -> None:
    every_s = Silence(0.9).look_every_s
    times = [index * every_s for index in range(16)]
    assert looks(Silence(0.9), times, [5] * 8 + [6] * 8) == [False] * 16


def test_a_process_that_was_stopped_itself_calls_nobody_dead() -> None:
    """Ten seconds without a processor: what the other end said meanwhile is read after this look."""
    silence = Silence(0.9)
    assert not silence.look(5, 0.0)
    assert not silence.look(5, 10.0)
    assert not silence.look(5, 10.1)
    assert not silence.look(6, 10.2)


@in_virtual_time
async def test_a_replica_that_stopped_reading_is_found_while_the_socket_is_full() -> None:
    """Whoever writes to it waits for room, and so would whoever pings it."""
    stopped = asyncio.Event()

    async def far_end(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send(wire.encode_hello(wire.Hello("r")))
        connection.transport.pause_reading()
        await stopped.wait()

    async with serve(far_end, "127.0.0.1", 0, max_size=wire.MAX_BATCH_BYTES, close_timeout=0.1) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        trunk = await Trunk.connect(f"ws://127.0.0.1:{port}", "i", CONFIG)
        told: asyncio.Queue[Down] = asyncio.Queue()
        trunk.attach("s", 1, told.put_nowait)
        for frame in range(4000):  # 15 MB, more than any socket takes
            trunk.send_nowait(FrameIn(FrameKey("s", 1, frame), PCM))
        began_s = time.monotonic()
        failed = await asyncio.wait_for(told.get(), 5)
        took_s = time.monotonic() - began_s
        assert isinstance(failed, Failed)
        assert failed.code == "replica_lost"
        assert took_s < 4 * CONFIG.dead_s  # no farewell is waited for
        await trunk.close()
        stopped.set()


@in_virtual_time
async def test_an_ingress_that_stopped_is_found_by_its_replica() -> None:
    replica = EchoReplica()
    server = TrunkServer(replica, "r1", CONFIG)
    trunk = await Trunk.connect(await server.start("127.0.0.1"), "i1", TrunkConfig(CONFIG.secret, 50.0, 100.0))
    inbox: asyncio.Queue[Down] = asyncio.Queue()
    trunk.attach("s", 1, inbox.put_nowait)
    trunk.send_nowait(OpenRequest("s", 1, "t", "i1", SessionSpec("v", "", 0)))
    await asyncio.wait_for(inbox.get(), 5)
    trunk._connection.transport.pause_reading()  # its pongs do not come any more
    async with asyncio.timeout(5):
        await replica.changed.wait()
    assert replica.closed == [("s", "left")]
    await trunk.close()
    await server.stop()

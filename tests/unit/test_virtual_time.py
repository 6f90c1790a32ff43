"""The clock of tests/virtual_time.py: it stands while anything is under way, and jumps when nothing is."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.virtual_time import in_virtual_time


@in_virtual_time
async def test_sleeps_are_exact_and_nobody_waits_for_them() -> None:
    began_s, process_s = asyncio.get_running_loop().time(), time.process_time()
    await asyncio.gather(asyncio.sleep(10_000), asyncio.sleep(4_000))
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(10_000)
    assert time.monotonic() == asyncio.get_running_loop().time()
    assert time.process_time() - process_s < 100
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1_000):
            await asyncio.Event().wait()


@in_virtual_time
async def test_it_stands_while_a_thread_works() -> None:
    began_s = asyncio.get_running_loop().time()
    async with asyncio.timeout(0.01):
        await asyncio.to_thread(time.sleep, 0.1)
    assert asyncio.get_running_loop().time() == began_s


@in_virtual_time
async def test_it_stands_while_a_socket_has_something() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    began_s = asyncio.get_running_loop().time()
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(100):
            writer.write(b"hello\n")
            async with asyncio.timeout(60):
                assert await reader.readline() == b"hello\n"
        writer.close()
        await writer.wait_closed()
    assert asyncio.get_running_loop().time() == began_s

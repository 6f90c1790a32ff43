"""The Locust user against a server of a few lines: every figure it promises is in the report."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import loadtest

LOCUSTFILE = Path(loadtest.__file__).parent / "locustfile.py"
ROW = re.compile(r"^chat +(.+?) +(\d+) +(\d+)\(.*?%\) \| +(\d+)", re.MULTILINE)  # name, calls, failures, mean in ms


async def test_a_run_reports_ready_audio_gaps_and_its_own_lag() -> None:
    asked: list[str] = []
    enough = asyncio.Event()

    async def echo(connection: ServerConnection) -> None:
        assert connection.request is not None
        asked.append(connection.request.path)
        if len(asked) == 2:
            await connection.send(b"\x05all slots are taken")
            return
        if len(asked) == 4:
            enough.set()  # one caller after the other: those before are in the books
        await connection.send(b"\x00")
        with suppress(ConnectionClosed):  # it hangs up when it has heard enough
            async for message in connection:
                await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", f"http://127.0.0.1:{port}"),
            *("--headless", "-u", "1", "-r", "1"),
            env={**os.environ, "PERSONAPLEX_SECONDS": "0.4", "PERSONAPLEX_VOICE": "NATM1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        talking = asyncio.create_task(process.communicate())
        stopping = asyncio.create_task(enough.wait())
        await asyncio.wait({talking, stopping}, timeout=120, return_when=asyncio.FIRST_COMPLETED)
        if not talking.done():
            process.terminate()
        output = (await asyncio.wait_for(talking, 60))[0].decode()
        stopping.cancel()
    assert enough.is_set(), output
    # What it prints at its end; a table by the second comes before it.
    rows = {name: (int(calls), int(failed), int(mean_ms)) for name, calls, failed, mean_ms in ROW.findall(output)}
    assert {"time to ready", "time to first audio", "frame gap", "reply lag", "generator lag"} <= rows.keys(), output
    assert rows["time to ready"][0] == 2
    # Calls of 0.4 s are 5 frames, 4 gaps: of 80 ms, and more or less where this machine has other work.
    gaps, _, mean_ms = rows["frame gap"]
    assert gaps == 2 * 4
    assert 20 < mean_ms < 2000
    # The second was refused, and said so.
    assert rows["conversation"][:2] == (3, 1)
    assert "all slots are taken" in output
    assert all("voice_prompt=NATM1" in path for path in asked)

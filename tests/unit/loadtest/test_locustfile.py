"""The Locust user against a server of a few lines: every figure it promises is in the report."""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from pathlib import Path

from websockets.asyncio.server import ServerConnection, serve

import loadtest

LOCUSTFILE = Path(loadtest.__file__).parent / "locustfile.py"


async def test_a_run_reports_ready_audio_gaps_and_its_own_lag(tmp_path: Path) -> None:
    asked: list[str] = []

    async def echo(connection: ServerConnection) -> None:
        assert connection.request is not None
        asked.append(connection.request.path)
        if len(asked) == 2:
            await connection.send(b"\x05all slots are taken")
            return
        await connection.send(b"\x00")
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", f"http://127.0.0.1:{port}"),
            *("--headless", "-u", "1", "-r", "1", "-t", "3s", "--csv", str(tmp_path / "run")),
            env={**os.environ, "PERSONAPLEX_SECONDS": "0.4", "PERSONAPLEX_VOICE": "NATM1"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    rows = {row["Name"]: row for row in csv.DictReader((tmp_path / "run_stats.csv").open())}
    assert {"time to ready", "time to first audio", "frame gap", "reply lag", "generator lag"} <= rows.keys(), output
    assert 40 < float(rows["frame gap"]["Median Response Time"]) < 120
    # Calls of 0.4 s are 5 frames, 4 gaps.
    calls = int(rows["time to ready"]["Request Count"])
    assert calls >= 2
    assert 4 * (calls - 1) <= int(rows["frame gap"]["Request Count"]) <= 4 * calls
    # The second was refused, and said so.
    assert int(rows["conversation"]["Failure Count"]) == 1
    failures = (tmp_path / "run_failures.csv").read_text()
    assert "all slots are taken" in failures
    assert all("voice_prompt=NATM1" in path for path in asked)

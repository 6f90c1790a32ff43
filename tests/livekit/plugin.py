"""Runs converse.py in LiveKit's own environment; see setup.sh."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-livekit/bin/python"
SET_UP = (ROOT / ".venv-livekit/requirements.txt").exists()  # written last
NOT_SET_UP = "LiveKit's plugin is not set up: run tests/livekit/setup.sh (480 MB, half a minute)"


async def converse(url: str, wav: Path, *options: str) -> dict[str, Any]:
    """What came of a conversation that LiveKit's plugin held with the server at `url`."""
    process = await asyncio.create_subprocess_exec(
        PYTHON, ROOT / "tests/livekit/converse.py", url.rstrip("/"), wav, *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return dict(json.loads(out))

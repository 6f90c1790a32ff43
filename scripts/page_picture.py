"""Takes docs/images/page.png: a real conversation on the page of a running server, in a headless Chromium.

    personaplex serve &
    PYTHONPATH=. python scripts/page_picture.py http://localhost:8998 docs/images/page.png

The microphone is one of the callers that ship with the project.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from loadtest.callers import CALLERS
from loadtest.speech import write_wav
from tests.browser import find_chromium, open_page

TALK_S = 15.0
WIDTH, HEIGHT = 1180, 870


async def take(url: str) -> bytes:
    """PNG."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium here: apt-get install chromium")
    caller = CALLERS[0]
    with tempfile.TemporaryDirectory() as folder:
        microphone = Path(folder) / "caller.wav"
        write_wav(microphone, caller.recording().pcm)
        async with open_page(chromium, microphone) as page:
            await page.look(width=WIDTH, height=HEIGHT, scale=1.5)
            await page.open(url)
            await page.until("!document.getElementById('voice').disabled")
            await page.run(
                f"document.getElementById('role').value = {caller.role!r};"
                "document.getElementById('role').dispatchEvent(new Event('input', {bubbles: true}));"
                "document.getElementById('talk').click()"
            )
            await page.until("document.getElementById('status').dataset.state === 'live'", within_s=30)
            await asyncio.sleep(TALK_S)
            return await page.screenshot()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    Path(sys.argv[2]).write_bytes(asyncio.run(take(sys.argv[1])))

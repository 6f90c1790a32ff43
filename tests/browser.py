"""A headless Chromium driven over its DevTools protocol: no driver, no package beyond `websockets`.

Its microphone plays a wav file in a loop, and its questions for permission answer themselves.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

START_S = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_chromium() -> str | None:
    """The browser's path; PERSONAPLEX_CHROMIUM names another one."""
    named = os.environ.get("PERSONAPLEX_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class PageError(AssertionError):
    """JavaScript on the page threw."""


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []  # what the page logged as an error, or threw

    async def listen(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.complaints.append(json.dumps(message["params"]["entry"])[:500])

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        async with asyncio.timeout(START_S):
            reply = await answer
        if "error" in reply:
            raise PageError(f"{method}: {reply['error']}")
        return dict(reply["result"])

    async def open(self, url: str) -> None:
        navigated = await self.command("Page.navigate", url=url)  # answered once the new document is there
        if "errorText" in navigated:
            raise PageError(f"{url}: {navigated['errorText']}")
        await self.until("document.readyState === 'complete'")

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise; counts as a user's gesture."""
        result = await self.command(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise PageError(json.dumps(result["exceptionDetails"])[:1000])
        return result["result"].get("value")

    async def until(self, condition: str, within_s: float = 60.0) -> None:
        """Wait until a JavaScript condition holds; it is looked at by the page."""
        held = await self.run(
            f"""new Promise(done => {{
                const end = performance.now() + {within_s * 1000};
                const look = () => {{
                    if ({condition}) done(true);
                    else if (performance.now() > end) done(false);
                    else setTimeout(look, 30);
                }};
                look();
            }})"""
        )
        if not held:
            text = await self.run("document.body.innerText")
            raise PageError(f"not within {within_s} s: {condition}\nthe page says:\n{text}\n{self.complaints}")

    async def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode((await self.command("Page.captureScreenshot", format="png"))["data"])

    async def look(self, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """The window's size, and what the system says about dark and light."""
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = "dark" if dark else "light"
        await self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@asynccontextmanager
async def open_page(chromium: str, microphone: Path) -> AsyncIterator[Page]:
    """A fresh browser with one empty page; `microphone` is the wav that it hears. Gone with all its children after."""
    with TemporaryDirectory(prefix="personaplex-browser-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            chromium,
            "--headless=new",
            "--no-sandbox",  # tests run as root in containers, where Chromium's sandbox cannot
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--use-fake-device-for-media-stream",
            "--use-fake-ui-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}",
            "--autoplay-policy=no-user-gesture-required",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = await _page_address(Path(profile) / "DevToolsActivePort")
            async with connect(address, max_size=None, compression=None) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                try:
                    for domain in ("Page", "Runtime", "Log"):
                        await page.command(f"{domain}.enable")
                    yield page
                finally:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()


async def _page_address(port_file: Path) -> str:
    """Chromium writes its port and the browser's path there; the page's own address is one question away."""
    port, path = await asyncio.to_thread(_devtools, port_file)
    async with connect(f"ws://127.0.0.1:{port}{path}", compression=None) as browser:
        await browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
        while (reply := json.loads(await browser.recv())).get("id") != 1:
            pass
    target = next(info for info in reply["result"]["targetInfos"] if info["type"] == "page")
    return f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}"


def _devtools(port_file: Path) -> tuple[str, str]:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if port_file.exists() and (lines := port_file.read_text().split("\n"))[1:]:
            return lines[0], lines[1]
        time.sleep(0.05)
    raise TimeoutError(f"Chromium did not start within {START_S} s")

"""Talks to a server of ours with LiveKit's PersonaPlex plugin as it is, and prints what came of it as JSON.

Runs in .venv-livekit (see setup.sh), never in the project's own environment: its pins are LiveKit's.
    .venv-livekit/bin/python tests/livekit/converse.py ws://127.0.0.1:8998 IN.wav --seconds 8
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import wave
from typing import Any

import aiohttp
import numpy as np
from livekit import rtc
from livekit.agents import llm
from livekit.plugins.nvidia.experimental.realtime import RealtimeModel

CHUNK_MS = 10  # what LiveKit's rooms deliver


class Listener:
    """Takes every generation's audio and words, as an agent session would."""

    def __init__(self) -> None:
        self.generations = 0
        self.samples = 0
        self.peak = 0
        self.words = ""
        self.errors: list[str] = []
        self.reconnects = 0
        self.first_audio_s: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, session: Any) -> None:
        session.on("generation_created", self._on_generation)
        session.on("error", lambda error: self.errors.append(str(error.error)))
        session.on("session_reconnected", self._on_reconnect)

    def _on_reconnect(self, _: Any) -> None:
        self.reconnects += 1

    def _on_generation(self, generation: llm.GenerationCreatedEvent) -> None:
        self.generations += 1
        task = asyncio.create_task(self._listen(generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, generation: llm.GenerationCreatedEvent) -> None:
        async for message in generation.message_stream:
            await asyncio.gather(self._hear(message.audio_stream), self._read(message.text_stream))

    async def _hear(self, audio: Any) -> None:
        async for frame in audio:
            if self.first_audio_s is None:
                self.first_audio_s = time.monotonic()
            pcm = np.frombuffer(frame.data, dtype=np.int16)
            self.samples += len(pcm)
            self.peak = max(self.peak, int(np.abs(pcm.astype(np.int32)).max(initial=0)))

    async def _read(self, text: Any) -> None:
        async for piece in text:
            self.words += str(piece)

    async def finish(self) -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*self._tasks)


async def converse(options: argparse.Namespace) -> dict[str, Any]:
    with wave.open(options.wav) as file:
        rate = file.getframerate()
        pcm = file.readframes(int(options.seconds * rate))
    step = rate * CHUNK_MS // 1000
    async with aiohttp.ClientSession() as http:
        model = RealtimeModel(
            base_url=options.url, voice=options.voice, text_prompt=options.role, seed=options.seed, http_session=http
        )
        session, listener = model.session(), Listener()
        listener.attach(session)
        started_s = time.monotonic()
        for number, start in enumerate(range(0, len(pcm) - 2 * step, 2 * step)):
            await asyncio.sleep(max(0.0, started_s + number * CHUNK_MS / 1000 - time.monotonic()))
            session.push_audio(rtc.AudioFrame(pcm[start : start + 2 * step], rate, 1, step))
        await asyncio.sleep(1.0)  # the last frames' answers, and the 500 ms after which the plugin ends a turn
        await session.aclose()
        await listener.finish()
        await model.aclose()
    return {
        "said_s": len(pcm) / 2 / rate,
        "heard_s": listener.samples / 24_000,
        "peak": listener.peak,
        "words": listener.words,
        "generations": listener.generations,
        "errors": listener.errors,
        "reconnects": listener.reconnects,
        "first_audio_s": None if listener.first_audio_s is None else listener.first_audio_s - started_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("wav", help="PCM16 mono, any rate")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--voice", default="NATF2")
    parser.add_argument("--role", default="You are a helpful assistant.")
    parser.add_argument("--seed", type=int)
    print(json.dumps(asyncio.run(converse(parser.parse_args()))), flush=True)
    # LiveKit's native threads panic now and then when the interpreter is taken apart beneath them: it is not.
    os._exit(0)


if __name__ == "__main__":
    main()

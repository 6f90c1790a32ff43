"""The bank of spoken utterances: each (voice, text) is synthesised once and used in many dialogues.

`python -m training.bank --dialogues 600 --workers 2` speaks what the first 600 dialogues of the plan need. It can
be stopped at any moment and goes on where it was; two runs give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.folders import state_folder
from training.kokoro import RATE, Kokoro, Utterance, Word
from training.plans import PLANS, held_out_of, script_of, to_speak
from training.roles import Split
from training.script import AGENT_VOICES, Plan, speech_of

_USER_SPEEDS = (0.9, 1.0, 1.1, 1.2)


def key_of(voice: str, text: str) -> str:
    """Names an utterance on disk. Agents' words begin with frames, users' wherever they do."""
    way = "kokoro-int8-frames-1" if voice in AGENT_VOICES else "kokoro-int8-1"
    return hashlib.blake2b(f"{way}\n{voice}\n{text}".encode(), digest_size=12).hexdigest()


def speed_of(voice: str, text: str) -> float:
    """Agents speak evenly; users slower or faster, by a hash of what they say."""
    if voice in AGENT_VOICES:
        return 1.0
    return _USER_SPEEDS[int(key_of(voice, text)[:8], 16) % len(_USER_SPEEDS)]


class Bank:
    """Utterances on disk: `<first two digits>/<key>.flac` with `<key>.json` beside it for the words."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or state_folder() / "speech"

    def path(self, voice: str, text: str) -> Path:
        key = key_of(voice, text)
        return self._folder / key[:2] / f"{key}.flac"

    def has(self, voice: str, text: str) -> bool:
        return self.path(voice, text).exists()

    def load(self, voice: str, text: str) -> Utterance:
        """Raises FileNotFoundError if it was never spoken."""
        path = self.path(voice, text)
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return Utterance(read_pcm(path), tuple(Word(*word) for word in about["words"]))

    def store(self, voice: str, text: str, utterance: Utterance) -> None:
        soundfile: Any = importlib.import_module("soundfile")
        path = self.path(voice, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [[word.text, word.start_s, word.end_s] for word in utterance.words]
        about = {"voice": voice, "text": text, "words": words}
        path.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        temporary = path.with_suffix(f".{os.getpid()}.part")
        soundfile.write(temporary, utterance.pcm, RATE, format="FLAC", subtype="PCM_16")
        temporary.replace(path)  # the audio comes last: a file that exists is whole, and so is its neighbour

    def files(self) -> list[Path]:
        """Every utterance's audio, in a fixed order."""
        return sorted(self._folder.glob("*/*.flac"))


def read_pcm(path: Path) -> npt.NDArray[np.int16]:
    """Mono or stereo FLAC → int16 [samples] or [samples, channels]."""
    soundfile: Any = importlib.import_module("soundfile")
    pcm: npt.NDArray[np.int16] = soundfile.read(path, dtype="int16")[0]
    return pcm


def wanted(plan: Plan, split: Split, dialogues: int) -> Iterator[tuple[str, str]]:
    """(voice, text) that the first dialogues of a plan need, each once, in order of need."""
    seen: set[tuple[str, str]] = set()
    for index in range(dialogues):
        for item in speech_of(script_of(plan, split, index)):
            if item not in seen:
                seen.add(item)
                yield item


def _worker(rank: int, workers: int, items: list[tuple[str, str]], progress: Any) -> None:
    os.nice(max(0, 19 - os.nice(0)))
    bank, voice_of = Bank(), Kokoro()
    for voice, text in items[rank::workers]:
        seconds = 0.0
        if not bank.has(voice, text):
            utterance = voice_of.say(text, voice, speed_of(voice, text), on_frames=voice in AGENT_VOICES)
            bank.store(voice, text, utterance)
            seconds = utterance.seconds
        with progress.get_lock():
            progress[0] += 1
            progress[1] += seconds


def speak(plan: Plan, split: Split, dialogues: int, workers: int) -> None:
    """Synthesises what is missing, with a progress line. Raises RuntimeError if a worker failed."""
    bank = Bank()
    every = list(wanted(plan, split, dialogues))
    # Agents first: what they say is what the model has to learn to say, and a bank may be stopped early.
    items = sorted((item for item in every if not bank.has(*item)), key=lambda item: item[0] not in AGENT_VOICES)
    print(f"{split}: {len(every)} utterances, {len(items)} to speak", flush=True)
    if not items:
        return
    context = multiprocessing.get_context("spawn")
    progress = context.Array("d", 2)
    team = [context.Process(target=_worker, args=(rank, workers, items, progress)) for rank in range(workers)]
    for process in team:
        process.start()
    started = time.monotonic()
    while any(process.is_alive() for process in team):
        for process in team:
            process.join(10.0 / workers)
        done, seconds = progress[0], progress[1]
        elapsed = time.monotonic() - started
        left = elapsed / max(done, 1) * (len(items) - done)
        bar = "#" * int(30 * done / len(items))
        print(
            f"\r[{bar:<30}] {int(done)}/{len(items)}  {seconds / 60:.1f} min of speech  "
            f"{seconds / max(elapsed, 1e-9):.2f} x real time  {left / 60:.0f} min left ",
            end="", flush=True,
        )  # fmt: skip
    print(flush=True)
    if any(process.exitcode for process in team):
        raise RuntimeError("a synthesis worker failed; its message is above. Run the same command to go on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=to_speak(), default="first")
    parser.add_argument("--dialogues", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    plan = PLANS[arguments.plan]
    step = 100  # the held-out side early on, the rest in order: whatever is there can already be used
    speak(plan, "train", min(step, arguments.dialogues), arguments.workers)
    speak(plan, "held_out", held_out_of(plan), arguments.workers)
    speak(plan, "train", arguments.dialogues, arguments.workers)


if __name__ == "__main__":
    main()

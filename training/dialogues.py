"""Renders dialogues: stereo FLAC at 24 kHz (agent, user) and a JSON with words, turns and facts beside each.

`python -m training.dialogues --dialogues 600` renders what the bank can already speak of a plan; the same command
later adds the rest. Dialogue n is the same bytes whenever it is made.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.config import FRAME_SAMPLES
from training.augment import Audio, coloured_noise, convolve, decibels, limited, microphone, room_response
from training.bank import Bank
from training.folders import state_folder, write_json
from training.kokoro import RATE
from training.plans import PLANS, held_out_of, script_of, to_speak
from training.roles import Split
from training.script import Plan, Script, speech_of
from training.timeline import FADE_S, Placed, Timeline, lay_out

_PER_FOLDER = 200


def dialogue_path(plan: str, split: Split, index: int) -> Path:
    """Where a dialogue's audio lies; its JSON has the same name with another suffix."""
    folder = state_folder() / "dialogues" / plan / split / f"{index // _PER_FOLDER:03d}"
    return folder / f"{index:05d}.flac"


def render(script: Script, timeline: Timeline, bank: Bank, seed: int) -> npt.NDArray[np.int16]:
    """[samples, 2] int16, agent left and user right, a whole number of frames."""
    side = 0 if script.split == "train" else 1
    rng = np.random.default_rng([seed, side, script.index, 3])
    samples = -(-timeline.samples // FRAME_SAMPLES) * FRAME_SAMPLES
    agent, user, others = (np.zeros(samples, dtype=np.float32) for _ in range(3))
    channels = {"agent": agent, "user": user, "aside": others}
    for item in timeline.placed:
        channels[item.speaker][item.start : item.stop] += _heard(item, bank)
    if others.any():
        # Somebody across the room: quieter, and more of the room than of the voice.
        far = convolve(others, room_response(rng)) * np.float32(decibels(-float(rng.uniform(12, 20))))
        user = user + far
    user = microphone(user, rng)
    if rng.random() < 0.03:  # a line that carries nothing but noise for the whole call is noise, too
        user = user + coloured_noise(samples, 1.0, rng) * np.float32(decibels(-float(rng.uniform(38, 50))))
    stereo = np.stack([limited(agent), limited(user)], axis=1)
    pcm: npt.NDArray[np.int16] = np.clip(np.round(stereo * 32767.0), -32768, 32767).astype(np.int16)
    return pcm


def _heard(item: Placed, bank: Bank) -> Audio:
    pcm = bank.load(item.voice, item.text).pcm[: item.samples].astype(np.float32) / np.float32(32768.0)
    fade = min(round(FADE_S * RATE), item.samples)
    pcm[-fade:] *= np.linspace(1.0, 0.0, fade, dtype=np.float32)
    return pcm


def describe(script: Script, timeline: Timeline) -> dict[str, Any]:
    """What training and judging need to know of a dialogue beside its sound."""
    return {
        "index": script.index,
        "role": script.role,
        "prompt": script.prompt,
        "agent_voice": script.agent_voice,
        "user_voice": script.user_voice,
        "enrolment": script.enrolment,
        "seconds": round(timeline.seconds, 3),
        "facts": [asdict(fact) for fact in script.facts],
        "events": [
            {
                "speaker": item.speaker,
                "kind": item.kind,
                "start_s": round(item.start / RATE, 3),
                "end_s": round(item.stop / RATE, 3),
                "text": item.text,
                "words": [[word.text, word.start_s, word.end_s] for word in item.words],
            }
            for item in timeline.placed
        ],
    }


def make(plan_name: str, plan: Plan, split: Split, index: int, bank: Bank) -> float:
    """Writes one dialogue. Returns its seconds."""
    soundfile: Any = importlib.import_module("soundfile")
    script = script_of(plan, split, index)
    timeline = lay_out(script, bank.load)
    path = dialogue_path(plan_name, split, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path.with_suffix(".json"), describe(script, timeline))
    temporary = path.with_suffix(f".{os.getpid()}.part")
    soundfile.write(temporary, render(script, timeline, bank, plan.seed), RATE, format="FLAC", subtype="PCM_16")
    temporary.replace(path)
    return timeline.seconds


def ready(plan: Plan, split: Split, index: int, bank: Bank) -> bool:
    """Whether the bank has every utterance of a dialogue."""
    return all(bank.has(voice, text) for voice, text in speech_of(script_of(plan, split, index)))


def load_description(path: Path) -> dict[str, Any]:
    """The JSON beside a dialogue's audio."""
    about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=to_speak(), default="first")
    parser.add_argument("--dialogues", type=int, default=600)
    arguments = parser.parse_args()
    os.nice(max(0, 19 - os.nice(0)))
    plan, bank = PLANS[arguments.plan], Bank()
    sides: tuple[tuple[Split, int], ...] = (("held_out", held_out_of(plan)), ("train", arguments.dialogues))
    for split, count in sides:
        made, waiting, seconds = 0, 0, 0.0
        for index in range(count):
            if dialogue_path(arguments.plan, split, index).exists():
                continue
            if not ready(plan, split, index, bank):
                waiting += 1
                continue
            seconds += make(arguments.plan, plan, split, index, bank)
            made += 1
            print(f"\r{split}: {index + 1}/{count}, {seconds / 60:.1f} min made now ", end="", flush=True)
        print(f"\r{split}: {made} made now, {waiting} wait for the bank, {count} asked for", flush=True)


if __name__ == "__main__":
    main()

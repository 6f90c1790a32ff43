"""Lets a checkpoint hold held-out conversations, to listen to: `python -m training.sample --checkpoint .state/export`.

The user's channel of a held-out dialogue is played to the model as a server would play it; what the model says is
written as stereo wav (agent, user) with its text. The user does not react: turns may miss each other.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphs.engine import ConversationEngine
from graphs.stages import SessionSpec
from models.checkpoint import Checkpoint, load_checkpoint
from models.config import AUDIO_CODEBOOKS, FRAME_SAMPLES, SAMPLE_RATE
from training.bank import read_pcm
from training.dialogues import dialogue_path, load_description
from training.folders import state_folder
from training.plans import HELD_OUT_DIALOGUES, to_judge
from training.script import VOICE_NAMES

_AGENT = slice(1, 1 + AUDIO_CODEBOOKS)


def converse(
    checkpoint: Checkpoint, spec: SessionSpec, user: npt.NDArray[np.int16]
) -> tuple[npt.NDArray[np.int16], str]:
    """Plays `user` [frames * 1920] int16 to the model; returns the agent's sound, as long, and its text.

    Raises ValueError if the checkpoint lacks its codec, its model or its tokenizer, or does not take the spec.
    """
    mimi, tokenizer = checkpoint.mimi, checkpoint.tokenizer
    if mimi is None or tokenizer is None:
        raise ValueError("this checkpoint cannot hear or write: it was loaded without its codec or tokenizer")
    audio = torch.from_numpy(user.astype(np.float32) / np.float32(32768.0))
    heard = mimi.encode_sequence(audio[None])[0].numpy().astype(np.int16)
    engine = ConversationEngine(checkpoint, 1)
    engine.open(0, spec)
    nobody = np.zeros((0, AUDIO_CODEBOOKS), dtype=np.int16)
    while not engine.step([], nobody).ready:
        pass
    frames = np.concatenate([engine.step([0], heard[n : n + 1]).tokens for n in range(len(heard))])
    said = mimi.decode_sequence(torch.from_numpy(frames[None, :, _AGENT].astype(np.int64)))[0].numpy()
    text = "".join(tokenizer.piece(int(token)) for token in frames[:, 0])
    return np.clip(np.round(said * 32767.0), -32768, 32767).astype(np.int16), text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=state_folder() / "export")
    parser.add_argument("--plan", choices=to_judge(), default="first")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--out", type=Path, default=state_folder() / "samples")
    parser.add_argument("--text-temperature", type=float, help="default: the checkpoint's")
    parser.add_argument("--audio-temperature", type=float, help="default: the checkpoint's")
    arguments = parser.parse_args()
    soundfile: Any = importlib.import_module("soundfile")
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(arguments.checkpoint)
    arguments.out.mkdir(parents=True, exist_ok=True)
    wished = {"text_temperature": arguments.text_temperature, "audio_temperature": arguments.audio_temperature}
    sampling = replace(checkpoint.sampling, **{name: value for name, value in wished.items() if value is not None})
    for index in range(min(arguments.count, HELD_OUT_DIALOGUES)):
        path = dialogue_path(arguments.plan, "held_out", index)
        about, user = load_description(path), read_pcm(path)[:, 1]
        user = user[: len(user) // FRAME_SAMPLES * FRAME_SAMPLES]
        spec = SessionSpec(VOICE_NAMES[about["agent_voice"]], about["prompt"], seed=index, sampling=sampling)
        agent, text = converse(checkpoint, spec, user)
        soundfile.write(arguments.out / f"{index:02d}.wav", np.stack([agent, user], axis=1), SAMPLE_RATE)
        asked = " | ".join(event["text"] for event in about["events"] if event["speaker"] == "user")
        print(f"{index:02d} {about['role']} {spec.voice}\n   user:  {asked}\n   agent: {text}", flush=True)


if __name__ == "__main__":
    main()

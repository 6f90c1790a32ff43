"""Encodes dialogues with the trained codec into what the language model learns from: `python -m training.codes`.

Writes `.state/codes/`: shards of a hundred dialogues (text, agent and user codes, role tokens) and the voices'
prompts with the codec's codes for silence and a 440 Hz sine. The same command later adds what was rendered since,
of any plan. They belong to one codec: the hash of its codebooks is kept beside them, and others start the folder anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import FRAME_SAMPLES
from models.demo_checkpoint import TOKENIZER, constant_codes
from models.mimi import Mimi
from models.tokenizer import TextTokenizer
from training.average import averaged
from training.bank import Bank, read_pcm
from training.codec_model import CONFIG, codes_digest
from training.dialogues import dialogue_path, load_description
from training.folders import state_folder, write_json
from training.kokoro import Word
from training.plans import HELD_OUT_DIALOGUES, to_speak
from training.roles import Split, load_common
from training.script import AGENT_VOICES
from training.state import load_state
from training.text_stream import text_stream

Shard = dict[str, Tensor]

_PER_SHARD = 100
SETTLED = 40  # frames, of a context of 32
_VOICE_FRAMES = (38, 75)  # a voice prompt takes 3 to 6 s


def load_codec(folder: Path) -> tuple[Mimi, int]:
    """The codec as trained so far, its weights averaged and as precise as they ship, and its step.

    Raises FileNotFoundError if there is none.
    """
    saved = load_state(folder)
    if saved is None:
        raise FileNotFoundError(f"{folder} has no codec: run `python -m training.codec` first")
    mimi = Mimi(CONFIG)
    tensors = averaged(saved[0])
    weights = {name.removeprefix("mimi."): value for name, value in tensors.items() if name.startswith("mimi.")}
    # As shipped: the codes must be those that the fp16 file will give.
    mimi.load_state_dict({name: value.half().float() for name, value in weights.items()})
    return mimi.eval(), int(saved[1]["step"])


def encode(mimi: Mimi, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """pcm [samples, channels] int16, whole frames → codes [channels, frames, 8] int16."""
    audio = torch.from_numpy(np.ascontiguousarray(pcm.T)).float() / 32768.0
    return np.asarray(mimi.encode_sequence(audio).numpy(), dtype=np.int16)


def encode_voices(mimi: Mimi, bank: Bank) -> dict[str, Tensor]:
    """Every agent voice's prompts that the bank can speak, and the codec's constant codes."""
    silence, sine = constant_codes(CONFIG, mimi.state_dict(), stored=torch.float16, frames=SETTLED)
    stored = {"silence": torch.tensor(silence), "sine": torch.tensor(sine)}
    for number, voice in enumerate(AGENT_VOICES):
        for which, line in enumerate(load_common().enrolment):
            if bank.has(voice, line):
                stored[f"prompt-{number:02d}-{which}"] = torch.from_numpy(_enrolment(mimi, bank, voice, line))
    return stored


def _enrolment(mimi: Mimi, bank: Bank, voice: str, line: str) -> npt.NDArray[np.int16]:
    pcm = bank.load(voice, line).pcm
    frames = min(max(-(-len(pcm) // FRAME_SAMPLES), _VOICE_FRAMES[0]), _VOICE_FRAMES[1])
    whole = np.zeros((frames * FRAME_SAMPLES, 1), dtype=np.int16)
    heard = pcm[: len(whole)]
    whole[: len(heard), 0] = heard
    [codes] = encode(mimi, whole)
    return np.asarray(codes)


def encode_shard(mimi: Mimi, paths: list[Path], tokenizer: TextTokenizer) -> Shard:
    """Some dialogues as the tensors of a shard."""
    coded = []
    for path in paths:
        about = load_description(path)
        agent, user = encode(mimi, read_pcm(path))
        spoken = [event for event in about["events"] if event["speaker"] == "agent"]
        words = sorted((Word(*word) for event in spoken for word in event["words"]), key=lambda word: word.start_s)
        text = text_stream(words, len(agent), tokenizer.encode)
        frames = np.concatenate([text[:, None], agent, user], axis=1)
        coded.append(Coded(int(path.stem), frames, about["prompt"], about["agent_voice"]))
    return shard_of(coded, tokenizer)


@dataclass(frozen=True)
class Coded:
    """A dialogue as tokens: frames [n, 17] int16, undelayed."""

    number: int
    frames: npt.NDArray[np.int16]
    prompt: str
    agent_voice: str
    reading: bool = False  # words follow from nothing
    learnt: npt.NDArray[np.bool_] | None = None  # [n]: what the agent does there; None: everywhere


def shard_of(coded: Sequence[Coded], tokenizer: TextTokenizer) -> Shard:
    """Dialogues as training.lm_data reads them."""
    roles = [np.array(tokenizer.encode_role(each.prompt), dtype=np.int16) for each in coded]
    return {
        "frames": torch.from_numpy(np.concatenate([each.frames for each in coded])),
        "roles": torch.from_numpy(np.concatenate(roles)),
        "frame_ends": torch.tensor(np.cumsum([len(each.frames) for each in coded])),
        "role_ends": torch.tensor(np.cumsum([len(role) for role in roles])),
        "voices": torch.tensor([AGENT_VOICES.index(each.agent_voice) for each in coded]),
        "numbers": torch.tensor([each.number for each in coded]),
        "readings": torch.tensor([each.reading for each in coded]),
        "learnt": torch.from_numpy(np.concatenate([_learnt(each) for each in coded])),
    }


def _learnt(coded: Coded) -> npt.NDArray[np.bool_]:
    return np.ones(len(coded.frames), dtype=np.bool_) if coded.learnt is None else coded.learnt


def save_whole(path: Path, tensors: Shard, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of tensors whole or not at all."""
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def joined(first: Shard, second: Shard) -> Shard:
    """The dialogues of both."""
    shard = {name: torch.cat([first[name], second[name]]) for name in first}
    for ends, table in (("frame_ends", "frames"), ("role_ends", "roles")):
        shard[ends] = torch.cat([first[ends], second[ends] + len(first[table])])
    return shard


@dataclass(frozen=True)
class Job:
    """A shard, and the dialogues it is still to get."""

    target: Path
    paths: list[Path]


def jobs(folder: Path, plan: str, split: Split, dialogues: int) -> list[Job]:
    """The shards that lack dialogues which have been rendered."""
    found = []
    for first in range(0, dialogues, _PER_SHARD):
        target = folder / f"{split}-{plan}-{first // _PER_SHARD:03d}.safetensors"
        has = set(load_file(target)["numbers"].tolist()) if target.exists() else set[int]()
        numbers = [n for n in range(first, min(first + _PER_SHARD, dialogues)) if n not in has]
        if paths := [path for n in numbers if (path := dialogue_path(plan, split, n)).exists()]:
            found.append(Job(target, paths))
    return found


def work(codec: Path, job: Job) -> str:
    """Does a job; returns what to tell of it."""
    os.nice(max(0, 19 - os.nice(0)))
    torch.set_num_threads(1)
    shard = encode_shard(load_codec(codec)[0], job.paths, TextTokenizer(TOKENIZER))
    if job.target.exists():
        shard = joined(load_file(job.target), shard)
    save_whole(job.target, shard)
    return f"{job.target.name}: {len(job.paths)} dialogues more, now {len(shard['numbers'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", choices=to_speak(), default="first")
    parser.add_argument("--dialogues", type=int, default=600)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--codec", type=Path, default=state_folder() / "codec")
    parser.add_argument("--folder", type=Path, default=state_folder() / "codes")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    mimi, step = load_codec(arguments.codec)
    about, digest = folder / "about.json", codes_digest(mimi.state_dict())
    if about.exists() and json.loads(about.read_text())["codebooks"] != digest:
        print(f"codes of another codec in {folder}: starting anew with step {step}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(about, {"codebooks": digest, "codec_step": step})
    save_file(encode_voices(mimi, Bank()), folder / "voices.safetensors")
    todo = jobs(folder, arguments.plan, "held_out", HELD_OUT_DIALOGUES)
    todo += jobs(folder, arguments.plan, "train", arguments.dialogues)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        for number, told in enumerate(pool.map(partial(work, arguments.codec), todo)):
            print(f"{number + 1}/{len(todo)}  {told}", flush=True)
    write_json(about, {"codebooks": digest, "codec_step": step, "complete": True})


if __name__ == "__main__":
    main()

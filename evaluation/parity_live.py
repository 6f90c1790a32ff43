"""The golden runs once more, through the Ray actors that serve: encoder, engine and decoder, each in a process."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from actors.decoder_actor import DecoderActor
from actors.encoder_actor import EncoderActor
from actors.engine_actor import EngineActor
from actors.stage_build import StageConfig
from evaluation.golden import VOICE, Golden, LmGolden, MimiGolden, write_checkpoint
from evaluation.play import GREEDY, golden_prompt, last_prompt_frame, play_mimi
from evaluation.verdict import CODES_EQUAL, PCM_TOLERANCE, Row, largest
from graphs.stages import Codes, FrameKey, SessionSpec, StageBatch, Verdict
from models.checkpoint import load_checkpoint
from models.config import AUDIO_CODEBOOKS, LMConfig

SLOTS, SLOT = 5, 3
TIMEOUT_S = 120.0  # of one call; the first includes loading
GOLDEN_SESSION, EPOCH = "golden", 1
_FULL_SCALE = 32_768.0


def run_live(goldens: Sequence[Golden], device: str) -> list[Row]:
    """Starts a local Ray for itself (or uses the one this process is connected to) and runs every golden run."""
    rows: list[Row] = []
    with local_ray():
        for golden in goldens:
            with tempfile.TemporaryDirectory(prefix="parity-") as scratch:
                folder = write_checkpoint(golden, Path(scratch))
                config = StageConfig(str(folder), slots=SLOTS, device=device, dtype="float32", anchor_s=0)
                if isinstance(golden, LmGolden):
                    rows += live_lm(golden, config)
                else:
                    rows += live_mimi(golden, config, folder)
    return rows


def live_lm(golden: LmGolden, config: StageConfig) -> list[Row]:
    """The golden conversation in slot 3 of 5 of an engine actor, in greedy tokens: logits stay in the actor."""
    lm_config = LMConfig.from_dict(golden.config)
    prompt = golden_prompt(lm_config, golden)
    run, steps = f"{golden.name}, live actors", len(golden.user)
    if prompt.frames > lm_config.window:
        # The engine refuses such a prompt, rightly; there is nothing to compare.
        return [Row(run, "steps with equal tokens", "prompt exceeds the context: not run", f"{steps}", True)]
    expected = golden.tokens.numpy()
    tokens = [last_prompt_frame(lm_config, prompt)]
    with actor(EngineActor, config) as engine:
        spec = SessionSpec(VOICE, "", 0, GREEDY, golden.role_tokens)
        call(engine.open, GOLDEN_SESSION, EPOCH, SLOT, spec)
        others = Neighbours(engine, golden.role_tokens, lm_config)
        ready: set[str] = set()
        while GOLDEN_SESSION not in ready:
            ready |= {session for session, _ in call(engine.step, others.batch(ready)).ready}
        for frame in range(steps - 1):
            heard = golden.user[frame].numpy().astype(np.int16)
            batch = others.batch(ready)
            keys = (*batch.keys, FrameKey(GOLDEN_SESSION, EPOCH, frame))
            reply = call(engine.step, StageBatch(keys, np.concatenate([batch.data, heard[None]])))
            ready |= {session for session, _ in reply.ready}
            if reply.frames.verdicts[-1] is not Verdict.DONE:
                raise RuntimeError(f"the engine answered frame {frame} with {reply.frames.verdicts[-1].name}")
            tokens.append(np.concatenate([reply.frames.data[-1], heard]))
    equal = int((np.stack(tokens) == expected).all(1).sum())
    return [Row(run, "steps with equal tokens", f"{equal}/{steps}", f"{steps}", equal == steps)]


class Neighbours:
    """Other sessions of the same engine actor, each in its own slot, which come and go."""

    def __init__(self, engine: Any, role: tuple[int, ...], config: LMConfig) -> None:
        self._engine, self._role, self._card = engine, role, config.card
        self._random = random.Random(17)
        self._slots = {f"neighbour-{slot}": slot for slot in range(SLOTS) if slot != SLOT}
        self._epochs = dict.fromkeys(self._slots, 0)
        self._frames: dict[str, int] = {}

    def batch(self, ready: set[str]) -> StageBatch:
        """Opens and closes some, and gives a frame to most of those that are ready."""
        for session, slot in self._slots.items():
            if session not in self._frames and self._random.random() < 0.3:
                self._epochs[session] += 1
                self._frames[session] = 0
                spec = SessionSpec(VOICE, "", self._random.getrandbits(40), role_tokens=self._role)
                call(self._engine.open, session, self._epochs[session], slot, spec)
            elif session in self._frames and self._random.random() < 0.05:
                call(self._engine.close, session, self._epochs[session])
                ready.discard(session)
                del self._frames[session]
        keys, data = [], []
        for session in sorted(self._frames.keys() & ready):
            if self._random.random() < 0.8:
                keys.append(FrameKey(session, self._epochs[session], self._frames[session]))
                data.append([self._random.randrange(self._card) for _ in range(AUDIO_CODEBOOKS)])
                self._frames[session] += 1
        return StageBatch(tuple(keys), np.array(data, dtype=np.int16).reshape(len(keys), AUDIO_CODEBOOKS))


def live_mimi(golden: MimiGolden, config: StageConfig, folder: Path) -> list[Row]:
    """The golden codec run through an encoder and a decoder actor, which speak int16.

    A golden input louder than int16 can hold is clipped, for the actor and for the model alone, whose codes are
    then the reference; the expected output is clipped like the actor's.
    """
    run = f"{golden.name}, live actors"
    pcm = to_int16(golden.pcm_in.numpy())
    heard = torch.from_numpy(pcm.astype(np.float32) / _FULL_SCALE)
    expected, source = golden.codes, "equal codes"
    if not torch.equal(heard, golden.pcm_in):
        mimi = load_checkpoint(folder, parts=frozenset({"mimi"})).mimi
        assert mimi is not None
        expected, _ = play_mimi(mimi, replace(golden, pcm_in=heard), 1, 0)
        source = "codes equal to the model's alone (int16 input)"
    with actor(EncoderActor, config) as encoder:
        codes = stream(encoder, pcm)
    with actor(DecoderActor, config) as decoder:
        out = stream(decoder, golden.codes.numpy().astype(np.int16))
    equal, total = int((torch.from_numpy(codes) == expected).sum()), expected.numel()
    wanted = golden.pcm_out.clamp(-1.0, (_FULL_SCALE - 1) / _FULL_SCALE)
    off = largest(torch.from_numpy(out.astype(np.float32)) / _FULL_SCALE - wanted)
    error = max(0.0, off - 0.5 / _FULL_SCALE)  # half a step is what int16 takes, whoever computes it
    return [
        Row(run, source, f"{equal}/{total}", f"{CODES_EQUAL:.0%}", equal >= CODES_EQUAL * total),
        Row(run, "PCM beyond int16 rounding", f"{error:.1e}", f"{PCM_TOLERANCE:.0e}", error <= PCM_TOLERANCE),
    ]


def stream(stage: Any, rows: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """Feeds rows [N, …] one a call to slot 3 of a codec actor, beside a neighbour that gets them reversed."""
    call(stage.open, GOLDEN_SESSION, EPOCH, SLOT)
    call(stage.open, "neighbour", EPOCH, 1)
    answers: list[Codes] = []
    for frame, row in enumerate(rows):
        keys = (FrameKey("neighbour", EPOCH, frame), FrameKey(GOLDEN_SESSION, EPOCH, frame))
        reply = call(stage.step, StageBatch(keys, np.stack([rows[-1 - frame], row])))
        answers.append(reply.data[1])
    return np.stack(answers)


def to_int16(pcm: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Float samples as they would come over a wire."""
    wide: npt.NDArray[np.float32] = np.clip(np.rint(pcm * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1)
    return wide.astype(np.int16)


def call(method: Any, *arguments: Any) -> Any:
    """One actor call, waited for."""
    answer: Any = ray.get(method.remote(*arguments), timeout=TIMEOUT_S)
    return answer


@contextmanager
def actor(kind: Any, config: StageConfig) -> Iterator[Any]:
    """An actor of that kind, loaded; killed afterwards."""
    gpus = 1.0 if config.device.startswith("cuda") else 0.0
    handle = kind.options(num_cpus=0, num_gpus=gpus).remote(config)
    try:
        call(handle.describe)
        yield handle
    finally:
        ray.kill(handle)


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray on this machine alone, shut down again if it was started here."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()

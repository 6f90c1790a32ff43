"""The real stage actors on a local Ray, with the demo checkpoint: conversations side by side, bits, deaths."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import ray
from ray.exceptions import RayError, RayTaskError

from actors.errors import BadRequest, NoCapacity, StaleEpoch
from actors.interfaces import ReplicaSettings
from actors.messages import FrameIn, OpenRequest
from actors.replica import Replica
from actors.stage_build import StageConfig
from actors.stages_actor import ActorOptions, StageActors
from graphs.stages import FrameKey, Sampling, SessionSpec
from models.checkpoint import load_checkpoint
from tests import polling
from tests.actor_fakes import Sink

Pcm = npt.NDArray[np.int16]
SLOTS, FRAMES = 4, 20
CONFIG = StageConfig(checkpoint="demo-random", slots=SLOTS, threads=1)
ONE_CPU = {"num_cpus": 1}
# Generous: this machine may be busy with other things, and lateness is not what these tests are about.
SETTINGS = ReplicaSettings(window_s=0.015, stage_timeout_s=120.0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    load_checkpoint("demo-random", parts=frozenset())  # made once, here, before three actors ask for it at a time
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def voices() -> list[str]:
    return load_checkpoint("demo-random", parts=frozenset()).voices.names()


@asynccontextmanager
async def running(stages: StageActors) -> AsyncIterator[Replica]:
    tokenizer = load_checkpoint("demo-random", parts=frozenset({"text"})).tokenizer
    assert tokenizer is not None
    replica = Replica(
        stages.encoder,
        stages.converse,
        stages.decoder,
        slots=SLOTS,
        tokenizer=tokenizer,
        numerics_id=stages.numerics_id,
        settings=SETTINGS,
    )
    loop = asyncio.create_task(replica.run())
    try:
        yield replica
    finally:
        await replica.stop()
        await loop


@asynccontextmanager
async def stage_actors() -> AsyncIterator[StageActors]:
    stages = await StageActors.start(CONFIG, CONFIG, ActorOptions(ONE_CPU, ONE_CPU, ONE_CPU), timeout_s=240)
    try:
        yield stages
    finally:
        stages.kill()


def speech(seed: int) -> Pcm:
    """[FRAMES, 1920] int16 of something that is neither silence nor the same for two seeds."""
    rng = np.random.default_rng(seed)
    t = np.arange(FRAMES * 1920) / 24_000
    wave = 0.2 * np.sin(2 * np.pi * (180 + 60 * seed) * t) + 0.05 * rng.standard_normal(len(t))
    return (wave * 32_767).clip(-32_768, 32_767).astype(np.int16).reshape(FRAMES, 1920)


class Said(NamedTuple):
    tokens: list[tuple[int, ...]]  # text, then the agent's 8 codes
    pcm: Pcm  # [frames, 1920]


async def until(sink: Sink, frames: int) -> None:
    """Returns once Ready (0) or that many frames have come; fails with what came instead."""
    async with asyncio.timeout(240):
        while len(sink.frames) < frames or not sink.ready:
            assert not sink.failed, sink.failed
            await asyncio.sleep(0.005)


async def converse(replica: Replica, session: str, spec: SessionSpec, pcm: Pcm, epoch: int = 1) -> Said:
    """A whole conversation, at the pace at which the replica answers."""
    sink = Sink()
    await replica.open(OpenRequest(session, epoch, "tenant", "ingress", spec), sink)
    await until(sink, 0)
    for frame in range(len(pcm)):
        replica.offer(FrameIn(FrameKey(session, epoch, frame), pcm[frame]))
        await until(sink, frame)  # one frame ahead, so that the stages overlap
    await until(sink, len(pcm))
    await replica.close(session, epoch, "done")
    assert [out.key.frame for out in sink.frames] == list(range(len(pcm)))
    return Said(
        [(out.text_token, *out.codes.tolist()) for out in sink.frames], np.stack([out.pcm for out in sink.frames])
    )


async def test_conversations_through_real_actors(cluster: None, voices: list[str]) -> None:
    """Four at once: the same seed says the same, token by token and sample by sample, as it says alone; a replica
    refuses the fifth; a bad request, and a call that ends in the middle, leave the others as they are."""
    specs = [
        SessionSpec(voices[i % len(voices)], role, seed=100 + i, sampling=sampling)
        for i, (role, sampling) in enumerate(
            [
                ("You are a wise and friendly teacher.", Sampling()),
                ("", Sampling(text_temperature=0.0, audio_temperature=0.0)),
                ("You work for a bakery and take orders.", Sampling(audio_top_k=20)),
                ("You enjoy having a good conversation.", Sampling(text_temperature=1.2)),
            ]
        )
    ]
    async with stage_actors() as stages:
        assert [d.stage for d in stages.descriptions] == ["encoder", "engine", "decoder"]
        assert all(d.load_s > 0 and d.memory_bytes > 0 and d.slots == SLOTS for d in stages.descriptions)
        async with running(stages) as replica:
            alone = await converse(replica, "alone", specs[0], speech(0))
            together = await asyncio.gather(
                *(converse(replica, f"s{i}", spec, speech(i)) for i, spec in enumerate(specs))
            )
            assert together[0].tokens == alone.tokens
            np.testing.assert_array_equal(together[0].pcm, alone.pcm)
            assert len({tuple(said.tokens) for said in together}) == 4, "four different conversations"
            assert replica.busy == 0

            sink = Sink()
            for i, spec in enumerate(specs):
                await replica.open(OpenRequest(f"t{i}", 1, "tenant", "ingress", spec), sink)
            with pytest.raises(NoCapacity):
                await converse(replica, "t4", specs[0], speech(0))
            for i in range(3):
                replica.offer(FrameIn(FrameKey(f"t{i}", 1, 0), speech(i)[0]))
                await replica.close(f"t{i}", 1, "gone with a frame on its way")
            with pytest.raises(BadRequest, match="no voice"):
                await replica.open(
                    OpenRequest("t5", 1, "tenant", "ingress", SessionSpec("../../etc/passwd", "", 1)), Sink()
                )
            again = await converse(replica, "last", specs[0], speech(0))
            assert again.tokens == alone.tokens
            await replica.close("t3", 1, "done")
            assert replica.healthy


async def test_an_actors_refusals_come_as_they_are_and_its_death_as_rays(cluster: None, voices: list[str]) -> None:
    async with stage_actors() as stages:
        await stages.encoder.open("a", 5, 0)
        with pytest.raises(StaleEpoch) as refusal:
            await stages.encoder.open("a", 4, 0)
        assert not isinstance(refusal.value, RayTaskError)
        assert refusal.value.message == "Conversation a is at epoch 5, not 4."
        await stages.encoder.close("a", 5)
        async with running(stages) as replica:
            sink = Sink()
            spec = SessionSpec(voices[0], "", 1)
            await replica.open(OpenRequest("b", 1, "tenant", "ingress", spec), sink)
            await until(sink, 0)
            ray.kill(stages.converse.actor)
            async with asyncio.timeout(60):
                while not sink.failed:
                    if replica.healthy:  # frame 0 may have been answered before the kill
                        due = len(sink.frames)
                        replica.offer(FrameIn(FrameKey("b", 1, due), speech(0)[due]))
                    await asyncio.sleep(0.01)
            assert [failed.code for failed in sink.failed] == ["engine_lost"]

            async def slot_is_free() -> bool:
                return replica.busy == 0

            await polling.until(slot_is_free, 60)  # once the two stages that live have let go of it
            assert not replica.healthy


async def test_a_checkpoint_that_is_none_leaves_no_actor(cluster: None, tmp_path: os.PathLike[str]) -> None:
    config = StageConfig(checkpoint=str(tmp_path), slots=1)
    with pytest.raises(RayError, match=r"config\.json"):
        await StageActors.start(config, config, ActorOptions(ONE_CPU, ONE_CPU, ONE_CPU), timeout_s=120)


async def test_rays_mixed_in_class_still_shows_code_and_message() -> None:
    """Where an error travels without `answer` in between."""
    shipped = RayTaskError("step", "traceback", NoCapacity("All 4 slots are taken.")).as_instanceof_cause()
    assert isinstance(shipped, NoCapacity)
    assert shipped.code == "no_capacity"
    assert shipped.message == "All 4 slots are taken."

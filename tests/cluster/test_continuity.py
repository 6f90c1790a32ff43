"""Real stage actors that die in the middle of conversations, are replaced, and go on from journals, bit for bit.

The checkpoint is so small that the windows of language model and codec wrap many times within seconds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import ray
from ray.actor import ActorHandle

from actors.interfaces import ReplicaSettings
from actors.journal import FRAMES_PER_S, Journal
from actors.messages import Down, FrameIn, FrameOut, OpenRequest
from actors.replica import Replica
from actors.stage_build import StageConfig
from actors.stages_actor import ActorOptions, StageActors
from graphs.stages import FrameKey, SessionSpec
from models.checkpoint import load_checkpoint
from tests.actor_fakes import Sink, Tokenizer
from tests.small_checkpoint import MIMI, write_small_checkpoint

Pcm = npt.NDArray[np.int16]
SLOTS, CALLS = 4, 3
FRAMES = 100  # the language model's window is 39, the codec's ring 10
# Generous: this machine may be busy with other things, and lateness is not what these tests are about.
SETTINGS = ReplicaSettings(window_s=0.005, stage_timeout_s=120.0, receptive_s=MIMI.receptive_frames / FRAMES_PER_S)
LITTLE = {"num_cpus": 0.5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_small_checkpoint(tmp_path_factory.mktemp("small"))
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield folder
    ray.shutdown()


class Site:
    """A replica on real actors, and what replaces them."""

    def __init__(self, stages: StageActors) -> None:
        self.stages = stages
        self.replica = Replica(
            stages.encoder,
            stages.converse,
            stages.decoder,
            slots=SLOTS,
            tokenizer=Tokenizer(),
            numerics_id=stages.numerics_id,
            settings=SETTINGS,
        )
        self.loop = asyncio.create_task(self.replica.run())

    async def mended(self) -> None:
        """As serving.replica_host.ReplicaHost does it."""
        await self.loop
        await self.stages.repair(self.replica.failed_stage, timeout_s=240)
        self.replica.revive(self.stages.encoder, self.stages.converse, self.stages.decoder)
        self.loop = asyncio.create_task(self.replica.run())

    def kill(self, stage: str) -> None:
        actor = {"encoder": self.stages.encoder, "engine": self.stages.converse, "decoder": self.stages.decoder}[stage]
        assert isinstance(actor.actor, ActorHandle)
        ray.kill(actor.actor)


@asynccontextmanager
async def site(checkpoint: Path) -> AsyncIterator[Site]:
    config = StageConfig(str(checkpoint), slots=SLOTS, threads=1)
    it = Site(await StageActors.start(config, config, ActorOptions(LITTLE, LITTLE, LITTLE), timeout_s=240))
    try:
        yield it
    finally:
        await it.replica.stop()
        await it.loop
        it.stages.kill()


class Heard(Sink):
    """A sink that can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._news = asyncio.Event()

    def __call__(self, message: Down) -> None:
        self.append(message)
        self._news.set()

    async def until(self, frames: int) -> bool:
        """Returns once Ready and so many frames have come; False if all was lost before."""
        async with asyncio.timeout(240):
            while not self.failed and (not self.ready or len(self.frames) < frames):
                self._news.clear()
                await self._news.wait()
        return not self.failed


class Caller:
    """A conversation at its ingress: it keeps the journal, and goes on from it when it is told that all is lost."""

    def __init__(self, name: str, voice: str, seed: int) -> None:
        self.name, self.spec = name, SessionSpec(voice, "", seed)
        rng = np.random.default_rng(seed)
        self.speech = rng.integers(-8000, 8000, (FRAMES, 1920)).astype(np.int16)
        self.journal = Journal(name, self.spec, SETTINGS.receptive_s)
        self.said: list[FrameOut] = []
        self.epoch = 0
        self.sink = Heard()

    async def open(self, replica: Replica) -> None:
        """Where there is something said already, from the journal."""
        self.epoch, self.sink = self.epoch + 1, Heard()
        journal = Journal.from_bytes(self.journal.to_bytes(), SETTINGS.receptive_s) if self.said else None
        await replica.open(OpenRequest(self.name, self.epoch, "tenant", "ingress", self.spec), self.sink, journal)
        assert await self.sink.until(0), self.sink.failed
        (ready,) = self.sink.ready
        assert ready.exact
        assert ready.next_frame == self.journal.next_frame
        self.journal.begin(ready.prompt_hash, ready.prompt_frames, ready.numerics_id)

    async def talk(self, replica: Replica, end: int, *, ahead: int = 4) -> None:
        """Up to frame `end`, some frames ahead; returns when all is answered, or everything lost."""
        first = self.journal.next_frame
        for frame in range(first, end):
            self.journal.heard(frame, self.speech[frame])
            if not await self.sink.until(frame - first - ahead):
                break
            replica.offer(FrameIn(FrameKey(self.name, self.epoch, frame), self.speech[frame]))
        await self.sink.until(end - first)
        for out in self.sink.frames:
            if self.journal.take(out):
                self.said.append(out)


def same(a: list[FrameOut], b: list[FrameOut]) -> None:
    assert [out.key.frame for out in a] == [out.key.frame for out in b] == list(range(len(a)))
    assert [(out.text_token, *out.codes.tolist()) for out in a] == [(out.text_token, *out.codes.tolist()) for out in b]
    np.testing.assert_array_equal([out.pcm for out in a], [out.pcm for out in b])


async def test_stages_that_die_and_calls_that_move_cost_no_frame(checkpoint: Path) -> None:
    """Three calls, each of the three stages killed at a random frame, and at last one call rebuilt beside the others
    that talk on; then everything is as it is undisturbed."""
    voice = load_checkpoint(str(checkpoint), parts=frozenset()).voices.names()[0]
    rng = random.Random(7)
    async with site(checkpoint) as it:
        callers = [Caller(f"c{i}", voice, 40 + i) for i in range(CALLS)]
        for stage, due in zip(("engine", "decoder", "encoder"), sorted(rng.sample(range(20, 80), 3)), strict=True):
            await asyncio.gather(*(caller.open(it.replica) for caller in callers))
            talks = [asyncio.create_task(caller.talk(it.replica, FRAMES)) for caller in callers]
            await callers[0].sink.until(due - callers[0].sink.ready[0].next_frame)
            before = it.stages.encoder, it.stages.converse, it.stages.decoder
            it.kill(stage)
            await asyncio.gather(*talks)
            assert all([failed.code for failed in caller.sink.failed] == ["engine_lost"] for caller in callers)
            await it.mended()
            after = it.stages.encoder, it.stages.converse, it.stages.decoder
            replaced = [new is not old for new, old in zip(after, before, strict=True)]
            assert replaced == [name == stage for name in ("encoder", "engine", "decoder")], "the others are kept"

        mover, *others = callers
        await asyncio.gather(*(caller.open(it.replica) for caller in callers))
        talks = [asyncio.create_task(caller.talk(it.replica, FRAMES)) for caller in others]
        await mover.talk(it.replica, 90)
        await it.replica.close(mover.name, mover.epoch, "moved away, and back")
        await mover.open(it.replica)
        await mover.talk(it.replica, FRAMES)
        await asyncio.gather(*talks)
        for caller in callers:
            await it.replica.close(caller.name, caller.epoch, "done")

        for caller in callers:
            undisturbed = Caller(f"u-{caller.name}", voice, caller.spec.seed)
            await undisturbed.open(it.replica)
            await undisturbed.talk(it.replica, FRAMES)
            await it.replica.close(undisturbed.name, undisturbed.epoch, "done")
            same(caller.said, undisturbed.said)
        assert len({tuple(out.text_token for out in caller.said) for caller in callers}) == CALLS

"""The socket between a replica and a stage: order, refusals, faults, deaths, and who may speak on it."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import stat
import struct
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from actors import stage_link
from actors.errors import NoCapacity, StaleEpoch
from actors.stage_link import StageGone, StageLink, StageServer
from graphs.stages import CodecPast, FrameKey, Past, RebuildReply, SessionSpec, StageBatch, StageReply, Verdict


class Stage:
    """Says what it was asked, refuses epoch 0, fails at epoch -1, and counts the order of its calls."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def open(self, session: str, epoch: int, slot: int, past: object = None) -> tuple[object, ...]:
        self.asked.append(f"open {session}")
        if epoch == 0:
            raise StaleEpoch("Conversation a is at epoch 5, not 0.", "Give up.")
        if epoch == -1:
            raise RuntimeError("out of memory")
        return session, epoch, slot, past

    def step(self, batch: StageBatch) -> StageReply:
        self.asked.append(f"step {len(batch.keys)}")
        self.may_go_on.wait(10)
        n = len(batch.keys)
        return StageReply(batch.keys, (Verdict.DONE,) * n, (0,) * n, batch.data[:, :8] + 1)

    def rebuild(self, budget_s: float) -> object:
        return threading.Lock()  # nothing that could be sent

    def close(self, session: str, epoch: int) -> None:
        self.asked.append(f"close {session}")


@asynccontextmanager
async def serving(stage: object) -> AsyncIterator[StageServer]:
    """A thread that answers. It ends with its caller: a test that leaves it running fails."""
    server = StageServer(stage)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        assert not Path(server.address).parent.exists()


def batch(n: int) -> StageBatch:
    keys = tuple(FrameKey(f"s{i}", 1, 7) for i in range(n))
    return StageBatch(keys, np.arange(n * 1920, dtype=np.int16).reshape(n, 1920))


async def test_calls_are_answered_in_their_order_with_what_the_stage_returned() -> None:
    stage = Stage()
    async with serving(stage) as server:
        link = await StageLink.to(server.address)
        past = CodecPast(np.full((300, 1920), -3, np.int16), next_frame=301)  # longer than a socket's buffer
        opened, stepped, closed = await asyncio.gather(
            link.call("open", "a", 1, 2, past), link.call("step", batch(4)), link.call("close", "a", 1)
        )
        assert opened[:3] == ("a", 1, 2)
        np.testing.assert_array_equal(opened[3].rows, past.rows)
        assert opened[3].next_frame == 301
        assert isinstance(stepped, StageReply)
        assert stepped.verdicts == (Verdict.DONE,) * 4
        assert stepped.keys[3] == FrameKey("s3", 1, 7)
        np.testing.assert_array_equal(stepped.data, batch(4).data[:, :8] + 1)
        assert stepped.data.dtype == np.int16
        assert closed is None
        assert stage.asked == ["open a", "step 4", "close a"]
        link.close()


async def test_an_engines_arguments_make_the_journey() -> None:
    async with serving(Stage()) as server:
        link = await StageLink.to(server.address)
        past = Past(np.ones((2, 17), np.int16), pending=np.full(17, -2, np.int16), user_before=np.ones(8, np.int16))
        spec = SessionSpec("NATF0", "You teach.", 2**63 - 1, role_tokens=(1, 2))
        _, _, came, went = await link.call("open", "a", 1, spec, past)
        assert came == spec
        np.testing.assert_array_equal(went.pending, past.pending)
        link.close()


async def test_a_refusal_comes_as_it_is_and_ends_nothing() -> None:
    async with serving(Stage()) as server:
        link = await StageLink.to(server.address)
        with pytest.raises(StaleEpoch) as refusal:
            await link.call("open", "a", 0, 0)
        assert type(refusal.value) is StaleEpoch
        assert refusal.value.message == "Conversation a is at epoch 5, not 0."
        assert refusal.value.next_step == "Give up."
        assert (await link.call("open", "a", 1, 0))[0] == "a"
        link.close()


@pytest.mark.parametrize(
    ("method", "arguments", "why"),
    [
        ("open", ("a", -1, 0), "out of memory"),
        ("rebuild", (0.1,), "cannot pickle"),
        ("shutdown", (), "a stage has no shutdown"),
    ],
)
async def test_what_is_no_answer_is_a_fault_of_the_stage(method: str, arguments: tuple[object, ...], why: str) -> None:
    async with serving(Stage()) as server:
        link = await StageLink.to(server.address)
        with pytest.raises(StageGone, match=why):
            await link.call(method, *arguments)
        link.close()


async def test_a_call_that_nobody_waits_for_does_not_shift_the_answers() -> None:
    stage = Stage()
    async with serving(stage) as server:
        link = await StageLink.to(server.address)
        stage.may_go_on.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.call("step", batch(1)), 0.01)
        later = asyncio.create_task(link.call("open", "b", 1, 0))
        stage.may_go_on.set()
        assert (await later)[0] == "b"
        link.close()


async def test_a_killed_stage_is_noticed_by_those_who_wait_and_those_who_come_later() -> None:
    code = (
        "import sys, time\n"
        "from actors.stage_link import StageServer\n"
        "class Stage:\n"
        "    def step(self, batch): time.sleep(60)\n"
        "server = StageServer(Stage())\n"
        "print(server.address, flush=True)\n"
        "server.serve()\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        link = await StageLink.to((await process.stdout.readline()).decode().strip())
        waiting = asyncio.create_task(link.call("step", batch(1)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        process.kill()
        with pytest.raises(StageGone):
            await asyncio.wait_for(waiting, 30)
        with pytest.raises(StageGone):
            await link.call("step", batch(1))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_a_link_that_was_closed_leaves_nobody_waiting() -> None:
    stage = Stage()
    async with serving(stage) as server:
        link = await StageLink.to(server.address)
        stage.may_go_on.clear()
        waiting = asyncio.create_task(link.call("step", batch(1)))
        await asyncio.sleep(0)
        link.close()
        with pytest.raises(StageGone):
            await asyncio.wait_for(waiting, 30)
        stage.may_go_on.set()


async def test_where_no_stage_listens_says_so() -> None:
    with pytest.raises(FileNotFoundError):
        await StageLink.to("/tmp/nowhere/calls")


def test_the_socket_is_its_users_alone_even_where_a_temporary_folder_has_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / ("long" * 30)):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        server = StageServer(Stage())
        assert stat.S_IMODE(Path(server.address).stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(server.address).parent.stat().st_mode) == 0o700
        server.close()
        server.close()
        assert not Path(server.address).parent.exists()
    assert not list((tmp_path / ("long" * 30)).iterdir())


class Calls:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    "nasty",
    [
        pickle.dumps(Calls()),
        b"\x80\x04\x8c\rgraphs.stages\x8c\x07np.load\x93.",  # by way of a module of ours
        b"\x80\x04\x8c\ractors.errors\x8c\x09from_code\x93.",  # a function of ours
        b"\x80\x04\x8c\rgraphs.stages\x8c\x07IntEnum\x93.",  # a class that only passes through there
        b"\x80\x04\x8c\x05numpy\x8c\x04load\x93.",
    ],
)
async def test_bytes_that_would_call_something_are_not_read(nasty: bytes) -> None:
    stage = Stage()
    async with serving(stage) as server:
        caller = socket.socket(socket.AF_UNIX)
        caller.connect(server.address)
        assert struct.unpack("!Q", caller.recv(8, socket.MSG_WAITALL)) != (0,), "which thread answers"
        caller.sendall(struct.pack("!Q", len(nasty)) + nasty)
        (length,) = struct.unpack("!Q", caller.recv(8, socket.MSG_WAITALL))
        _, why = pickle.loads(caller.recv(length, socket.MSG_WAITALL))
        assert "has no business" in why
        caller.close()
        assert stage.asked == []


@pytest.mark.parametrize(
    "said",
    [
        RebuildReply((("a", 1),), 2),
        NoCapacity("All 4 slots are taken."),
        (Verdict.STALE, np.int64(3), np.float32(0.5), np.zeros((0, 9), np.int16), None, True, b"x", {"a": [1.5]}),
    ],
)
def test_everything_that_stages_say_can_be_read(said: object) -> None:
    again = stage_link._read(stage_link._framed(said)[8:])
    assert type(again) is type(said)
    assert str(again) == str(said)

"""Many calls against a server of a few lines: each way in which a call can go is counted as what it is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

import numpy as np
import pytest
from websockets.asyncio.server import Request, Response, ServerConnection, serve

from loadtest.chat_wire import ChatOptions
from loadtest.generators import GeneratorDied, processes_for, run_load
from loadtest.load import NOT_READY, CallRecord, Count, LoadPlan, Speeches, counts, hold_calls
from loadtest.speech import FRAME_S
from tests.virtual_time import in_virtual_time

Handler = Callable[[ServerConnection], Awaitable[None]]

TONE = (0.3 * np.sin(np.arange(5 * 1920) / 12)).astype(np.float32)


@asynccontextmanager
async def serving(handler: Handler, busy: bool = False) -> AsyncIterator[str]:
    def turn_away(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "no room") if busy else None

    async with serve(handler, "127.0.0.1", 0, compression=None, process_request=turn_away) as server:
        host, port = next(iter(server.sockets)).getsockname()[:2]
        yield f"http://{host}:{port}"


def plan(server: str, **changes: object) -> LoadPlan:
    return LoadPlan(**({"server": server, "sessions": 2, "seconds": 0.5, "speech": (TONE,)} | changes))  # type: ignore[arg-type]


async def hold(asked: LoadPlan, totals: list[int] | None = None) -> list[CallRecord]:
    loop = asyncio.get_running_loop()
    return await hold_calls(
        asked,
        range(asked.sessions),
        Speeches(asked),
        start_s=loop.time(),
        totals=counts() if totals is None else totals,
        clock=loop.time,
    )


async def echo(connection: ServerConnection) -> None:
    await connection.send(b"\x00")
    async for message in connection:
        await connection.send(message)


@in_virtual_time
async def test_calls_that_are_held_to_the_end() -> None:
    totals = counts()
    async with serving(echo) as server:
        records = await hold(plan(server), totals)
    assert [(record.call, record.outcome, record.code) for record in records] == [(0, "held", ""), (1, "held", "")]
    for record in records:
        # 0.5 s hold six frames, the first of which has left after 80 ms.
        assert 4 <= len(record.timings.heard_s) <= 6
        assert record.timings.ended_s is not None
        assert record.timings.underruns == 0
    assert totals[Count.UP] == 0
    assert totals[Count.OVER] == 2
    assert totals[Count.FAILED] == 0
    assert totals[Count.FRAMES] == sum(len(record.timings.heard_s) for record in records)


@in_virtual_time
async def test_whoever_hangs_up_at_the_end_says_goodbye() -> None:
    codes: list[int | None] = []

    async def notes(connection: ServerConnection) -> None:
        await echo(connection)
        codes.append(connection.close_code)

    async with serving(notes) as server:
        await hold(plan(server))
    assert codes == [1000, 1000]


@in_virtual_time
async def test_a_full_server_refuses_with_its_code_and_sentence() -> None:
    taken = 0

    async def one_slot(connection: ServerConnection) -> None:
        nonlocal taken
        taken += 1
        if taken > 1:
            await connection.send(b"\x05all slots are taken")
            await connection.close(1013)
        else:
            await echo(connection)

    async with serving(one_slot) as server:
        records = await hold(plan(server, sessions=3, ramp_s=0.1))
    assert [record.outcome for record in records] == ["held", "refused", "refused"]
    assert [(record.code, record.sentence) for record in records[1:]] == [("1013", "all slots are taken")] * 2


@in_virtual_time
async def test_an_answer_of_http_is_a_refusal_with_its_status() -> None:
    async with serving(echo, busy=True) as server:
        records = await hold(plan(server, sessions=1))
    assert [(record.outcome, record.code) for record in records] == [("refused", "503")]


@in_virtual_time
async def test_nobody_there() -> None:
    async with serving(echo) as server:
        pass
    (record,) = await hold(plan(server, sessions=1))
    assert (record.outcome, record.code) == ("refused", "none")
    assert server in record.sentence


@in_virtual_time
async def test_a_call_that_is_cut_is_lost_with_its_code() -> None:
    async def cuts(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        await connection.send(await connection.recv())
        await connection.close(1011, "the engine died")

    async with serving(cuts) as server:
        records = await hold(plan(server))
    assert [(record.outcome, record.code) for record in records] == [("lost", "1011")] * 2
    assert all(len(record.timings.heard_s) == 1 for record in records)


@in_virtual_time
async def test_an_agent_that_is_never_ready_is_a_refusal_of_its_own() -> None:
    async def mute(connection: ServerConnection) -> None:
        await connection.wait_closed()

    async with serving(mute) as server:
        records = await hold(plan(server))
    assert [(record.outcome, record.code) for record in records] == [("refused", NOT_READY)] * 2


@in_virtual_time
async def test_a_server_that_falls_silent_does_not_go_unseen() -> None:
    async def stops(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        for _ in range(2):
            await connection.send(await connection.recv())
        async for _ in connection:
            pass

    async with serving(stops) as server:
        (record,) = await hold(plan(server, sessions=1, seconds=0.8))
    assert record.outcome == "held"
    assert record.timings.open_gap_ms == pytest.approx(800 - 2 * 80, abs=1)
    assert record.timings.underruns == 1


@in_virtual_time
async def test_what_is_no_opus_is_a_fault_of_the_protocol() -> None:
    async def hisses(connection: ServerConnection) -> None:
        await connection.send(b"\x00")
        await connection.send(b"\x01hiss")
        await connection.wait_closed()

    async with serving(hisses) as server:
        (record,) = await hold(plan(server, sessions=1))
    assert (record.outcome, record.code) == ("lost", "protocol")
    assert "Ogg" in record.sentence


def test_who_dials_when_and_with_what() -> None:
    asked = plan("x", sessions=4, seconds=10, ramp_s=2.0, voices=("A", "B"), roles=("r",), seed=7, key="k")
    assert [asked.dialled_s(call) for call in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert asked.over_s == 12
    assert asked.options(3) == ChatOptions("B", "r", 10, "k")
    assert "k" not in repr(asked).split("voices")[1].split("seed")[1]


class TestGenerators:
    def test_a_hundred_calls_take_one(self) -> None:
        assert [processes_for(sessions) for sessions in (1, 100, 101, 400)] == [1, 1, 2, 4]

    async def test_two_processes_share_the_calls_and_one_clock(self) -> None:
        seen: list[list[int]] = []
        async with serving(echo) as server:
            asked = plan(server, sessions=4, seconds=2.0, ramp_s=0.4)
            records = await asyncio.to_thread(run_load, asked, 2, lambda totals: seen.append(list(totals)))
        assert [record.call for record in records] == [0, 1, 2, 3]
        assert all(record.outcome == "held" for record in records)
        first_s = records[0].timings.opened_s
        for record in records:
            # A second for a machine with other work; clocks that are not one are hours apart.
            assert record.timings.opened_s - first_s == pytest.approx(asked.dialled_s(record.call), abs=1.0)
            most = math.floor((asked.over_s - asked.dialled_s(record.call)) / FRAME_S)
            assert most // 2 < len(record.timings.heard_s) <= most + 1
        assert max(totals[Count.UP] for totals in seen) == 4
        frames = [totals[Count.FRAMES] for totals in seen]
        assert frames == sorted(frames)

    def test_a_generator_that_cannot_speak_is_said_to_have_died(self) -> None:
        with pytest.raises(GeneratorDied):
            run_load(plan("http://127.0.0.1:9", speech=(np.zeros(0, dtype=np.float32),)), 1)

"""A replica whose engine has promised more memory than it has: what it reports, and whom it asks to leave."""

from __future__ import annotations

from dataclasses import replace

from actors.messages import OpenRequest
from graphs.stages import MemoryReport
from tests.actor_fakes import Bench, Sink, alone, heard, request
from tests.fake_clock import settle

FULL = MemoryReport(
    room=0, pressure="migrate one", migrate=(("a", 1),), parked=(), seconds_left=8.0, pages=10, free_pages=1
)


async def test_whoever_the_engine_suggests_is_asked_to_leave_and_talks_on() -> None:
    async with Bench() as bench:
        sinks = {session: await bench.open(session) for session in "ab"}
        await settle()
        assert bench.replica.room == bench.replica.slots - 2
        bench.replica._calls.remembers(FULL)
        assert bench.replica.room == 0
        assert [(move.session, move.epoch, move.reason) for move in sinks["a"].moves] == [("a", 1, "pressure")]
        assert not sinks["b"].moves
        await bench.talk("a", range(2))
        assert heard(sinks["a"]) == alone("a", 2)


async def test_the_engine_names_a_call_by_the_epoch_it_came_under() -> None:
    async with Bench() as bench:
        await bench.replica.open(replace(request("a"), resumable=True), Sink())
        await settle()
        second = Sink()
        await bench.replica.open(OpenRequest("a", 7, "t", "ingress-2", request("a").spec, adopt=True), second)
        bench.replica._calls.remembers(FULL)
        assert [move.epoch for move in second.moves] == [7]


async def test_nobody_is_asked_before_it_is_ready() -> None:
    async with Bench(prompt_steps=10**6) as bench:
        sink = await bench.open("a")
        bench.replica._calls.remembers(FULL)
        assert not sink.moves


async def test_what_the_engine_said_is_forgotten_when_somebody_has_gone() -> None:
    """It says how much room there is with its steps, and an empty replica takes none: its last word would stay."""
    async with Bench() as bench:
        await bench.open("a")
        await settle()
        bench.replica._calls.remembers(FULL)
        await bench.replica.close("a", 1, "gone")
        assert bench.replica.room == bench.replica.slots

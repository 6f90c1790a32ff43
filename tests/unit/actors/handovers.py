"""Conversations that change hands, for tests: what an ingress has of one, and how it asks for it."""

from __future__ import annotations

from dataclasses import replace

from actors.journal import Journal
from actors.messages import OpenRequest
from tests.actor_fakes import Bench, Sink, frame_in, request
from tests.fake_clock import settle


async def held(frames: int, session: str = "a", heard_ahead: int = 0) -> tuple[Journal, Sink]:
    """What an ingress has of a conversation whose replica is gone: its journal, off a trunk, and what it heard."""
    async with Bench() as bench:
        sink = await bench.open(session)
        await settle()
        await bench.talk(session, range(frames))
        journal = bench.replica.journal(session, 1)
        for frame in range(frames, frames + heard_ahead):
            journal.heard(frame, frame_in(session, frame).pcm)
        return Journal.from_bytes(journal.to_bytes()), sink


async def rebuilt(bench: Bench, journal: Journal, epoch: int = 2) -> Sink:
    sink = Sink()
    blob = journal.to_bytes()
    asked = replace(request(journal.session, epoch), journal_bytes=len(blob))
    await bench.replica.open(asked, sink, Journal.from_bytes(blob))
    return sink


def resuming(session: str, epoch: int, ingress: str = "ingress-2") -> OpenRequest:
    return replace(request(session, epoch), ingress=ingress, adopt=True, resumable=True, serial=epoch)


async def resumable(bench: Bench, session: str = "a") -> Sink:
    sink = Sink()
    await bench.replica.open(replace(request(session), resumable=True), sink)
    await settle()
    return sink

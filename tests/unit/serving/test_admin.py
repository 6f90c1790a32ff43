"""What operators and witnesses are told, and who is one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from actors.journal import Journal
from graphs.stages import FrameKey
from serving.admin import admin_routes, journal_view
from serving.api import IngressParts, build_api
from serving.routing import RouterStatus
from serving.session import ConversationHub
from serving.tenants import Tenants, hash_key
from tests.chat_fakes import EchoServer
from tests.failover_callers import run, talk
from tests.failover_fakes import TENANT, Trunks, World
from tests.fake_replica import SPEC, Model, spoken, undisturbed
from tests.unit.serving.test_api import CATALOG

HOME = "http://localhost"


async def status() -> RouterStatus:
    return RouterStatus(1, 1, 4, 0, 0, "x")


async def stop() -> None:
    """Nothing to stop."""


def app(world: World, hub: ConversationHub, tenants: Tenants) -> FastAPI:
    admin = admin_routes(hub, world.router, Trunks(world.replicas), tenants)
    return build_api(IngressParts(CATALOG, tenants, EchoServer(slots=1).endpoint, status, admin), stop)


@asynccontextmanager
async def asking(
    world: World, hub: ConversationHub | None = None, tenants: Tenants | None = None, base: str = HOME
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app(world, hub or world.hub, tenants or Tenants()))
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        yield client


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_journal_can_be_read_at_any_ingress(elsewhere: bool) -> None:
    world = World()
    asked = world.ingress("i1") if elsewhere else world.hub
    async with world.hub.open(SPEC, TENANT, "test") as conversation, asking(world, asked) as client:
        await run(world, conversation.ready())
        await talk(world, conversation, 12)
        path = f"/admin/conversations/{conversation.session}/journal"
        answer = (await run(world, client.get(path))).json()
        assert (answer["session"], answer["epoch"], answer["replica"]) == (conversation.session, 1, "r0")
        assert (answer["seed"], answer["next_frame"], answer["first_row"]) == ("7", 12, 0)
        assert [frame["frame"] for frame in answer["frames"]] == list(range(12))
        assert [frame["text_token"] for frame in answer["frames"]] == undisturbed(12)
        assert all(len(frame["codes"]) == 8 for frame in answer["frames"])
        late = (await run(world, client.get(path, params={"from": 9}))).json()
        assert late["frames"] == answer["frames"][9:]
        assert (await run(world, client.get(path, params={"from": 99}))).json()["frames"] == []
        assert (await client.get(path, params={"from": -1})).status_code == 400
    await world.assert_nothing_is_left()


async def test_two_may_ask_at_once() -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test") as conversation, asking(world, world.ingress("i1")) as client:
        await run(world, conversation.ready())
        await talk(world, conversation, 3)
        path = f"/admin/conversations/{conversation.session}/journal"

        async def both() -> list[int]:
            return [answer.json()["next_frame"] for answer in await asyncio.gather(client.get(path), client.get(path))]

        assert await run(world, both()) == [3, 3]
    await world.assert_nothing_is_left()


def test_what_slid_out_is_not_told() -> None:
    journal, model = Journal("s", SPEC, receptive_s=1.6), Model(SPEC)
    for number in range(60):
        journal.heard(number, spoken(number))
        journal.take(model.step(FrameKey("s", 1, number), spoken(number)))
    frames = journal_view(journal, 1, "r", 0)["frames"]
    assert frames[0]["frame"] == journal.agent_codes.start > 0
    assert [frame["text_token"] for frame in frames] == undisturbed(60)[journal.agent_codes.start :]
    journal.anchor(60, 55)
    assert [frame["frame"] for frame in journal_view(journal, 1, "r", 0)["frames"]] == list(range(54, 60))
    journal.pending = journal.pending[:0]  # of a build that does not send it: the last text is not known yet
    assert [frame["frame"] for frame in journal_view(journal, 1, "r", 0)["frames"]] == list(range(54, 59))


async def test_conversations_and_replicas_are_listed_and_emptied() -> None:
    world = World()
    async with world.hub.open(SPEC, TENANT, "test") as conversation, asking(world) as client:
        await run(world, conversation.ready())
        await talk(world, conversation, 3)
        answer = (await client.get("/admin/conversations")).json()
        assert (answer["ingress"], answer["node"], answer["process"]) == ("i0", "node-1", os.getpid())
        (listed,) = answer["data"]
        assert listed["session"] == conversation.session
        assert (listed["replica"], listed["frames_answered"], listed["moves"]) == ("r0", 3, 0)
        replicas = (await client.get("/admin/replicas")).json()["data"]
        assert (replicas[0]["replica"], replicas[0]["node"], replicas[0]["busy"]) == ("r0", "node", 1)
        assert (await client.post("/admin/replicas/r0/drain")).status_code == 202
        await talk(world, conversation, 5)
        (listed,) = (await client.get("/admin/conversations")).json()["data"]
        assert (listed["replica"], listed["moves"]) == ("r1", 1)
        unknown = await client.post("/admin/replicas/nobody/drain")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "unknown_replica"
    await world.assert_nothing_is_left()


async def test_a_conversation_that_is_not_there() -> None:
    async with asking(World()) as client:
        answer = await client.get("/admin/conversations/nobody/journal")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "unknown_session"


async def test_only_admins(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[[tenants]]\nname = "ops"\nadmin = true\nkeys = ["sha256:{hash_key("ops")}"]\n'
        f'[[tenants]]\nname = "acme"\nkeys = ["sha256:{hash_key("acme")}"]\n'
    )
    async with asking(World(), tenants=Tenants.load(keys), base="http://talk.example") as client:
        for path in ("replicas", "conversations", "conversations/x/journal"):
            assert (await client.get(f"/admin/{path}")).status_code == 401
            refused = await client.get(f"/admin/{path}", headers={"Authorization": "Bearer acme"})
            assert refused.status_code == 401
            assert "admin = true" in refused.json()["error"]["message"]
        assert (await client.post("/admin/replicas/r0/drain", params={"api_key": "acme"})).status_code == 401
        assert (await client.get("/admin/replicas", headers={"Authorization": "Bearer ops"})).status_code == 200


async def test_without_keys_it_is_for_this_machine_and_for_no_page() -> None:
    async with asking(World()) as client:
        assert (await client.get("/admin/replicas")).status_code == 200
        assert (
            await client.post("/admin/replicas/r0/drain", headers={"Origin": "https://evil.example"})
        ).status_code == 401
        assert (await client.get("/admin/replicas", headers={"Origin": HOME})).status_code == 200
    async with asking(World(), base="http://rebound.example") as client:
        assert (await client.get("/admin/replicas")).status_code == 401

"""The whole system on this machine, once: tenants' limits, telemetry as a collector sees it, a clean stop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from serving.local import LocalStartError, start_local
from serving.settings import ServeSettings
from serving.tenants import hash_key
from tests.collector import Collector
from tests.polling import until
from tests.real_server import call, serve

KEY, OTHER_KEY = "pp_live_0123456789", "pp_live_9876543210"
LIMIT = 2


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


class Running:
    """A server in a process of its own, which may be stopped before its fixture does."""

    def __init__(self, **settings: object) -> None:
        self._stack = ExitStack()
        self.url = self._stack.enter_context(serve(**settings))

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    tenants = [
        {"name": "acme", "max_conversations": LIMIT, "keys": [f"sha256:{hash_key(KEY)}"]},
        {"name": "other", "keys": [f"sha256:{hash_key(OTHER_KEY)}"]},
    ]
    keys.write_text(json.dumps({"tenants": tenants}))
    running = Running(slots=4, keys_file=keys, otlp_endpoint=collector.endpoint, otlp_interval_s=1)
    yield running
    running.stop()


@pytest.fixture
def server(running: Running) -> str:
    return running.url


async def test_it_is_ready_and_answers_carry_a_request_id(server: str) -> None:
    async with httpx.AsyncClient(base_url=server) as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json()["slots"] == 4
        assert len(answer.headers.get_list("x-request-id")) == 1
        refused = await client.get("/v1/voices")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
        assert (await client.get("/v1/voices", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200
    address = server.replace("http", "ws", 1) + f"/api/chat?audio=pcm&api_key={KEY}"
    async with connect(address) as websocket:
        assert websocket.response is not None
        assert websocket.response.headers["x-request-id"]


async def test_without_a_known_key_nobody_talks(server: str) -> None:
    for query in ({}, {"api_key": "wrong"}):
        async with call(server, **query) as caller:
            code, error = await caller.closed()
            assert code == 1008
            assert error is not None
            assert "API key" in error


async def test_a_tenant_at_its_limit_is_refused_and_another_is_not(server: str) -> None:
    async with call(server, api_key=KEY) as one, call(server, api_key=KEY) as two:
        await one.ready()
        await two.ready()
        async with call(server, api_key=KEY) as three:
            code, error = await three.closed()
            assert (code, error is not None and f"limit of {LIMIT}" in error) == (1008, True)
        async with call(server, api_key=OTHER_KEY) as other:
            await other.ready()

    async def one_more() -> bool:  # the limit counts conversations, not those there have been
        async with call(server, api_key=KEY) as caller:
            with suppress(ConnectionClosed):
                await caller.ready()
            return bool(caller.metadata)

    await until(one_more, within_s=60)


async def test_a_conversation_is_a_trace_and_its_frames_are_in_the_histogram(server: str, collector: Collector) -> None:
    async with call(server, api_key=OTHER_KEY, seed=7) as caller:
        await caller.ready()
        await caller.speak(15)
        session = caller.metadata["session"]

    async def exported() -> bool:
        return bool(collector.trace_of(session)) and collector.frame_count() >= 15

    await until(exported, within_s=60)
    spans = collector.trace_of(session)
    assert {span.name for span in spans} == {"conversation", "admission", "prefill", "live"}
    (root,) = [span for span in spans if span.name == "conversation"]
    attributes = {pair.key: pair.value for pair in root.attributes}
    assert attributes["personaplex.tenant"].string_value == "other"
    assert attributes["personaplex.frames"].int_value >= 15


def test_a_port_that_is_taken_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LocalStartError, match=f"{port} cannot be listened on.*--port"):
            start_local(ServeSettings(port=port))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LocalStartError, match="nowhere"):
        start_local(ServeSettings(port=0, checkpoint=str(tmp_path / "nowhere")))


async def test_when_it_stops_callers_are_told_to_come_back(running: Running) -> None:
    """The last one: it stops the server that the others used."""
    async with call(running.url, api_key=KEY) as caller:
        await caller.ready()
        stopping = asyncio.get_running_loop().run_in_executor(None, running.stop)
        code, error = await caller.closed()
        assert code == 1012
        assert error is not None
        assert "stopping" in error
        await stopping

"""The HTTP surface: health, lists, errors in one shape, a request id on every answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from actors.errors import NoCapacity
from graphs.stages import Sampling
from serving.api import IngressParts, build_api, page_of
from serving.catalog import Catalog
from serving.routing import RouterStatus
from serving.tenants import Tenant, Tenants, hash_key
from tests.chat_fakes import EchoServer

CATALOG = Catalog(
    "personaplex-demo",
    False,
    ("NATF0", "NATF1", "VARM3"),
    sampling=Sampling(0.4, 25, 0.6, 250),
    roles=(("Café", "You sell coffee."),),
)
STARTING = RouterStatus(replicas=1, admitting=0, slots=4, busy=0, waiting=0, incarnation="x")
READY = RouterStatus(replicas=1, admitting=1, slots=4, busy=2, waiting=0, incarnation="x")


class Site:
    """An ingress's application without a socket."""

    def __init__(self) -> None:
        self.status: RouterStatus | None = READY
        self.tenants = Tenants()
        self.stopped = False

    async def router_status(self) -> RouterStatus:
        if self.status is None:
            raise NoCapacity("The session router cannot be reached.")
        return self.status

    async def stop(self) -> None:
        self.stopped = True

    def app(self) -> FastAPI:
        chat = EchoServer(slots=1).endpoint
        return build_api(IngressParts(CATALOG, self.tenants, chat, self.router_status), self.stop)


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
async def client(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(site.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def test_health_is_of_the_process_and_readiness_of_the_system(site: Site, client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready", "replicas": 1, "slots": 4, "busy": 2}
    site.status = STARTING
    assert (await client.get("/readyz")).status_code == 503
    site.status = None
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_capacity")
    assert (await client.get("/healthz")).status_code == 200


async def test_the_model_says_whether_it_can_speak(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["trained"]) == ("personaplex-demo", "model", False)


async def test_the_model_says_how_it_is_sampled_where_nobody_says_how(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    wanted = {"text_temperature": 0.4, "text_top_k": 25, "audio_temperature": 0.6, "audio_top_k": 250}
    assert model["sampling"] == wanted


async def test_the_model_says_which_roles_it_knows(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert model["roles"] == [{"name": "Café", "text": "You sell coffee."}]


async def test_voices_come_in_pages(client: httpx.AsyncClient) -> None:
    first = (await client.get("/v1/voices", params={"limit": 2})).json()
    assert [voice["id"] for voice in first["data"]] == ["NATF0", "NATF1"]
    assert (first["object"], first["first_id"], first["last_id"], first["has_more"]) == ("list", "NATF0", "NATF1", True)
    rest = (await client.get("/v1/voices", params={"after": first["last_id"]})).json()
    assert [voice["id"] for voice in rest["data"]] == ["VARM3"]
    assert rest["has_more"] is False


def test_a_page_of_nothing() -> None:
    assert page_of([], None, 5) == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/v1/nothing", 404, "not_found", None),
        ("POST", "/v1/voices", 405, "method_not_allowed", None),
        ("GET", "/v1/voices?limit=0", 400, "invalid_parameter", "limit"),
        ("GET", "/v1/voices?limit=many", 400, "invalid_parameter", "limit"),
    ],
)
async def test_errors_have_one_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str, param: str | None
) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


async def test_with_keys_the_lists_want_one_and_health_does_not(site: Site) -> None:
    site.tenants = Tenants({hash_key("secret"): Tenant("acme")})
    transport = httpx.ASGITransport(site.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/v1/models", "/v1/voices"):
            refused = await client.get(path)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
            assert (await client.get(path, headers={"Authorization": "Bearer secret"})).status_code == 200
            assert (await client.get(path, params={"api_key": "secret"})).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_the_page_is_served(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    assert answer.status_code == 200
    assert "text/html" in answer.headers["content-type"]


async def test_an_upgrade_is_answered_with_a_request_id(site: Site) -> None:
    app = site.app()
    for given in (None, b"from the caller"):
        sent: list[dict[str, object]] = []
        incoming = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}]
        headers = [(b"x-request-id", given)] if given else []
        scope = {"type": "websocket", "path": "/api/chat", "query_string": b"", "headers": headers, "subprotocols": []}

        async def receive(messages: list[dict[str, object]] = incoming) -> dict[str, object]:
            return messages.pop(0)

        async def send(message: object, into: list[dict[str, object]] = sent) -> None:
            assert isinstance(message, dict)
            into.append(message)

        await app(scope, receive, send)
        accepted = sent[0]
        assert accepted["type"] == "websocket.accept"
        (value,) = [value for name, value in accepted["headers"] if name == b"x-request-id"]  # type: ignore[attr-defined] # a list of pairs
        assert value == given if given else len(value) == 32

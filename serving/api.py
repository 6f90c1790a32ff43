"""The HTTP application at the ingress: health, lists, `/api/chat`, the page. No Ray in here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.errors import ServingError
from serving.catalog import Catalog
from serving.errors import error_body, http_error_body, http_status
from serving.ingress_chat import ChatEndpoint
from serving.routing import RouterStatus
from serving.tenants import Tenants
from serving.web_page import WebPage

REQUEST_ID = b"x-request-id"
Shutdown = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class IngressParts:
    """What the routes speak to. `status` raises a ServingError while the router is away."""

    catalog: Catalog
    tenants: Tenants
    chat: ChatEndpoint
    status: Callable[[], Awaitable[RouterStatus]]
    admin: APIRouter | None = None  # serving.admin's


def build_api(parts: IngressParts, on_shutdown: Shutdown) -> FastAPI:
    """The FastAPI application of one ingress."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await on_shutdown()

    api = FastAPI(title="PersonaPlex", lifespan=lifespan, redoc_url=None)
    api.add_middleware(UpgradeRequestId)
    _add_error_handlers(api)
    _add_health(api, parts)
    _add_lists(api, parts)

    @api.websocket("/api/chat")
    async def chat(socket: WebSocket) -> None:
        await parts.chat.serve(socket)

    if parts.admin is not None:
        api.include_router(parts.admin)
    api.mount("/", WebPage())
    return api


def _add_health(api: FastAPI, parts: IngressParts) -> None:
    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process is up."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> JSONResponse:
        """200 when at least one replica takes new conversations."""
        try:
            status = await parts.status()
        except ServingError as error:
            return JSONResponse(error_body(error), 503)
        body = {
            "status": "ready" if status.admitting else "starting",
            "replicas": status.replicas,
            "slots": status.slots,
            "busy": status.busy,
        }
        return JSONResponse(body, 200 if status.admitting else 503)


def _add_lists(api: FastAPI, parts: IngressParts) -> None:
    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        parts.tenants.authenticate(request.headers, request.query_params)
        name = parts.catalog.model
        owner = name.split("/")[0] if "/" in name else "personaplex-serving"  # a repository's owner, or ours
        sampling = asdict(parts.catalog.sampling)  # what a caller gets who names none
        roles = [{"name": name, "text": text} for name, text in parts.catalog.roles]  # a chooser's, where it has any
        about = {"trained": parts.catalog.trained, "notice": parts.catalog.notice, "sampling": sampling, "roles": roles}
        model = {"id": name, "object": "model", "owned_by": owner, **about}
        return page_of([model], after=None, limit=1)

    @api.get("/v1/voices")
    async def voices(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 100
    ) -> dict[str, Any]:
        parts.tenants.authenticate(request.headers, request.query_params)
        listed = [{"id": name, "object": "voice"} for name in parts.catalog.voices]
        return page_of(listed, after, limit)


def page_of(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """One page of a list in the API's shape: what comes behind the id `after`, at most `limit`."""
    ids = [item["id"] for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _add_error_handlers(api: FastAPI) -> None:
    """Every failed answer has the API's shape, whoever failed it."""

    @api.exception_handler(ServingError)
    async def ours(_: Request, error: ServingError) -> JSONResponse:
        return JSONResponse(error_body(error), http_status(error))

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(http_error_body(error.status_code, code, message), error.status_code, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(http_error_body(400, "invalid_parameter", f"{param}: {first['msg']}.", param), 400)


class UpgradeRequestId:
    """Puts `x-request-id` on the answer to a WebSocket upgrade. Serve does so for plain requests alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        request_id = given or uuid4().hex.encode()

        async def with_id(message: Message) -> None:
            if message["type"] in ("websocket.accept", "websocket.http.response.start"):
                headers = [pair for pair in message.get("headers", ()) if pair[0] != REQUEST_ID]
                message = {**message, "headers": [*headers, (REQUEST_ID, request_id)]}
            await send(message)

        await self._app(scope, receive, with_id)

"""A conversation hub whose replica is an echo, and a WebSocket client without a socket, to drive /api/chat with.

The hub, its conversations, pacing and journals are the real ones; only what lies behind the trunk is made up: each
frame of the user comes back as the agent's, and every fifth one brings a word.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Protocol
from urllib.parse import urlencode

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.websockets import WebSocket

from actors.errors import NoCapacity, TenantLimit, UnknownReplica, UnknownSession
from actors.messages import CloseRequest, DownSink, Failed, FrameIn, FrameOut, OpenRequest, Ready, Up
from graphs.stages import Sampling
from serving.ingress_chat import ChatEndpoint, ServedModel
from serving.resume import Tickets
from serving.routing import AcquireRequest, Grant, ReplicaView, ResumeRequest
from serving.session import ConversationHub, Place
from serving.settings import ServeSettings
from serving.tenants import Tenants
from serving.web_page import WebPage

WORDS = (" hello", " there", ",", " friend")
VOICES = ("NATF0", "NATF2", "NATM0", "VARF1", "VARM3")
CODES, ROW = np.zeros(8, dtype=np.int16), np.zeros(17, dtype=np.int16)


class FakeRouter:
    """Counts slots; refuses when they are out."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: set[str] = set()
        self.granted = 0
        self.refused = asyncio.Event()
        self._changed = asyncio.Event()

    async def until_held(self, slots: int) -> None:
        """Wait until so many slots are taken."""
        async with asyncio.timeout(30):
            while len(self.held) != slots:
                self._changed.clear()
                await self._changed.wait()

    async def acquire(self, request: AcquireRequest) -> Grant:
        if not request.recovery:
            if request.tenant_limit is not None and len(self.held) >= request.tenant_limit:
                raise TenantLimit("This key's conversations are all in use.")
            if len(self.held) >= self.slots:
                self.refused.set()
                raise NoCapacity("Every slot is taken.")
        self.held.add(request.session)
        self.granted += 1
        self._changed.set()
        return Grant(request.session, request.after_epoch + 1, "replica-0", "ws://echo", "fake")

    async def release(self, session: str, epoch: int, *, opened: bool) -> None:
        self.held.remove(session)  # a double release is a KeyError
        self._changed.set()

    async def abandon(self, session: str, after_epoch: int = 0) -> None:
        self.held.discard(session)

    async def prepare(self, request: AcquireRequest) -> Grant:
        raise NoCapacity("Nowhere to move to.")

    async def commit(self, session: str, epoch: int) -> None:
        raise AssertionError("nothing was prepared")

    async def resume(self, request: ResumeRequest) -> Grant:
        raise UnknownSession("Not here.")

    async def locate(self, session: str) -> Grant | None:
        return None

    async def replicas(self) -> tuple[ReplicaView, ...]:
        return ()

    async def drain(self, replica: str) -> None:
        raise UnknownReplica("There is none.")


class EchoTrunk:
    """A replica that says back what it hears. `ready` may be held up; `fail` ends every conversation."""

    def __init__(self, *, prompt_s: float = 0.0, answer_s: float = 0.0) -> None:
        self.version = 2
        self.prompt_s = prompt_s
        self.answer_s = answer_s
        self.heard: list[FrameIn] = []
        self.opened: list[OpenRequest] = []
        self._sinks: dict[str, DownSink] = {}

    async def get(self, address: str) -> EchoTrunk:
        return self

    def attach(self, session: str, epoch: int, sink: DownSink) -> None:
        self._sinks[session] = sink

    def detach(self, session: str, epoch: int) -> None:
        del self._sinks[session]

    async def send(self, message: Up) -> None:
        self.send_nowait(message)

    def send_nowait(self, message: Up) -> None:
        if isinstance(message, OpenRequest):
            self.opened.append(message)
            self._later(self.prompt_s, Ready(message.session, message.epoch, 0, 40, "hash", self.prompt_s * 1000))
        elif isinstance(message, FrameIn):
            self.heard.append(message)
            text = WORDS[message.key.frame // 5 % len(WORDS)] if message.key.frame % 5 == 4 else ""
            self._later(
                self.answer_s, FrameOut(message.key, message.pcm, 0, text, CODES, CODES, ROW, self.answer_s * 1000)
            )
        else:
            assert isinstance(message, CloseRequest)

    def _later(self, delay_s: float, message: Ready | FrameOut) -> None:
        session = message.session if isinstance(message, Ready) else message.key.session

        def deliver() -> None:
            sink = self._sinks.get(session)
            if sink is not None:
                sink(message)

        loop = asyncio.get_running_loop()
        if delay_s > 0:
            loop.call_later(delay_s, deliver)
        else:
            loop.call_soon(deliver)

    def fail(self, code: str, message: str) -> None:
        for session, sink in list(self._sinks.items()):
            sink(Failed(session, 1, code, message))


class EchoServer:
    """Everything behind one /api/chat endpoint."""

    def __init__(
        self,
        *,
        slots: int = 4,
        trunk: EchoTrunk | None = None,
        tenants: Tenants | None = None,
        sampling: Sampling | None = None,
        **settings: Any,
    ) -> None:
        """sampling: what the model recommends; else the published values."""
        self.settings = ServeSettings(**settings)
        self.router = FakeRouter(slots)
        self.trunk = trunk or EchoTrunk()

        def has_voice(name: str) -> bool:
            return name.removesuffix(".pt") in VOICES

        self.hub: ConversationHub = ConversationHub(
            self.router, self.trunk, Place("ingress-0", "node-0"), self.settings, has_voice=has_voice
        )
        model = ServedModel("demo", trained=False, default_voice="NATF0", sampling=sampling or Sampling())
        self.endpoint = ChatEndpoint(self.hub, tenants or Tenants(), self.settings, model, Tickets("a secret"))

    @asynccontextmanager
    async def call(
        self, query: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> AsyncIterator[FakeClient]:
        client = FakeClient(self.endpoint, query or {}, headers or {})
        try:
            yield client
        finally:
            client.vanish()
            await client.ended()
            await self.hub.close()
            assert not self.router.held, "a slot was not given back"


class ChatSite(Protocol):
    """What can be served: an EchoServer, or something like it."""

    @property
    def endpoint(self) -> ChatEndpoint: ...

    @property
    def hub(self) -> ConversationHub: ...


@asynccontextmanager
async def served(
    server: ChatSite,
    *,
    trained: bool = False,
    notice: str = "",
    sampling: Sampling | None = None,
    roles: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[str]:
    """The page, the two lists it asks for, and /api/chat, over real HTTP."""
    listed = [{"name": name, "text": text} for name, text in roles]
    about: dict[str, Any] = {"trained": trained, "notice": notice, "roles": listed}
    if sampling is not None:
        about["sampling"] = asdict(sampling)
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "personaplex-demo", **about}]}

    @app.get("/v1/voices")
    async def voices() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name} for name in VOICES]}

    @app.websocket("/api/chat")
    async def chat(websocket: WebSocket) -> None:
        await server.endpoint.serve(websocket)

    app.mount("/", WebPage())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        http = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            http.should_exit = True
            await serving
            await server.hub.close()


class FakeClient:
    """The far end of a WebSocket, at the level of ASGI messages."""

    def __init__(self, endpoint: ChatEndpoint, query: dict[str, str], headers: dict[str, str]) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.reads = asyncio.Event()  # cleared: the client takes nothing more
        self.reads.set()
        self._gone = False
        scope = {
            "type": "websocket",
            "path": "/api/chat",
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
            "query_string": urlencode(query).encode(),
            "client": ("127.0.0.1", 50_000),
        }
        self._incoming.put_nowait({"type": "websocket.connect"})
        self._task = asyncio.create_task(endpoint.serve(WebSocket(scope, self._incoming.get, self._send)))

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if self._gone:
            raise OSError("the client is gone")
        self._outgoing.put_nowait(message)

    def say(self, message: bytes | str) -> None:
        key = "text" if isinstance(message, str) else "bytes"
        self._incoming.put_nowait({"type": "websocket.receive", key: message})

    def vanish(self) -> None:
        self._gone = True
        self.reads.set()
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1006})

    def hang_up(self) -> None:
        self._gone = True
        self.reads.set()
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1000})

    async def ended(self) -> None:
        async with asyncio.timeout(30):
            await self._task

    async def hear(self) -> dict[str, Any]:
        """The next ASGI message from the server."""
        async with asyncio.timeout(30):
            return await self._outgoing.get()

    async def hear_kind(self, kind: int) -> bytes:
        """The payload of the next message of this kind; others are skipped. An end before it is a failure."""
        while True:
            message = await self.hear()
            assert message["type"] != "websocket.close", f"closed with {message}"
            if message["type"] == "websocket.send" and message["bytes"][0] == kind:
                return bytes(message["bytes"][1:])

    async def live(self) -> dict[str, Any]:
        """Waits for the handshake; the conversation's metadata."""
        assert (await self.hear())["type"] == "websocket.accept"
        message = await self.hear()
        assert message["bytes"] == b"\0\0\0", message
        return dict(json.loads(await self.hear_kind(4)))

    async def refusal(self) -> tuple[str, int]:
        """The error's sentence and the close code, which must be the last two messages."""
        sentence = (await self.hear_kind(5)).decode()
        closed = await self.hear()
        assert closed["type"] == "websocket.close"
        assert sentence.startswith(closed["reason"])
        await self.ended()
        assert self._outgoing.empty()
        return sentence, int(closed["code"])

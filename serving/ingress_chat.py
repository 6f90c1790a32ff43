"""`/api/chat` at the ingress: one WebSocket drives one conversation. The wire is serving/protocols/api_chat.py's.

    accept ─ key, query checked ─ slot taken ─┬─ read    socket → inbox          never waits for the model
                                              ├─ feed    inbox → decode → frames (80 ms, paced by the conversation)
                                              ├─ speak   prompt in → handshake; agent's frames → socket
                                              └─ watch   the conversation fails → so do all

How fast a client may send, and how long it may take nothing, serving/guard.py sees to where Serve meets the socket.
The four live in one task group: the first to end ends the others, the slot is given back, and then the client is
told why: one message of kind 5 and a close code. What a codec costs the event loop per frame is in
docs/decisions/opus.md; everything else here is microseconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from actors.errors import IdleClient, ServingError, SlowClient
from serving.audio.errors import AudioError, LibopusMissingError
from serving.audio.payload import (
    OpusPayloadDecoder,
    OpusPayloadEncoder,
    PayloadDecoder,
    PayloadEncoder,
    PcmPayloadDecoder,
    PcmPayloadEncoder,
)
from serving.audio.silence import SilenceGate
from serving.errors import INTERNAL_ERROR, close_code
from serving.protocols import api_chat
from serving.protocols.api_chat import Audio, Control, Event, Hello, NotApplied, Ping, ProtocolError, Steer
from serving.protocols.chat_query import ChatRequest, parse_query
from serving.resume import Missed, Tickets
from serving.session import Conversation, ConversationHub
from serving.settings import ServeSettings
from serving.tenants import Tenant, Tenants

log = logging.getLogger(__name__)

FAREWELL_S = 2.0  # a client that does not take the reason for its end within this does not get it
LOST = 1006  # what stands for a close frame that never came, RFC 6455 section 7.1.5
HANGING_UP = (1000, 1001, 1005)  # done, the page is left, closed without a code: such a client does not come back
CLOSE_FRAME_S = 0.2  # after a write has failed: what a close frame says may be about to be read
_MESSAGE_COST_BYTES = 64  # what an empty message counts as in the inbox, so that a flood of them fills it too


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the metadata of a conversation says of the checkpoint."""

    name: str
    trained: bool
    default_voice: str


class ChatEndpoint:
    """Serves `/api/chat`. One per ingress process."""

    def __init__(
        self, hub: ConversationHub, tenants: Tenants, settings: ServeSettings, model: ServedModel, tickets: Tickets
    ) -> None:
        self._hub = hub
        self._tickets = tickets
        self._tenants = tenants
        self._settings = settings
        self._model = model

    async def serve(self, socket: WebSocket) -> None:
        """Hold the conversation until either side ends it. Raises nothing but its own cancellation."""
        await socket.accept()
        try:
            tenant = self._tenants.authenticate(socket.headers, socket.query_params)
            request = parse_query(socket.query_params, role_max_chars=self._settings.role_max_chars)
            await self._converse(socket, request, tenant)
        except _ClientGone:
            return
        except ProtocolError as error:
            await _farewell(socket, error.message, error.close_code)
        except ServingError as error:
            await _farewell(socket, str(error), close_code(error))
        except LibopusMissingError as error:
            log.error("%s", error)
            await _farewell(socket, "The server cannot handle Opus; try audio=pcm.", INTERNAL_ERROR)
        except Exception:
            log.exception("a conversation ended by a fault of this server")
            await _farewell(socket, "The server failed. " + ServingError.default_next_step, INTERNAL_ERROR)

    async def _converse(self, socket: WebSocket, request: ChatRequest, tenant: Tenant) -> None:
        """One conversation, or several in a row where the client says restart: same spec, same seed, new slot."""
        client = socket.client.host if socket.client else "unknown"
        line = _Line(socket, request, self._settings)
        opening = self._opening(request, tenant, client)
        try:
            while True:
                async with opening as conversation:
                    again = await self._hold(line, conversation, request)
                if not again:
                    return
                # The release of the old slot is a task that has not run yet; it is to reach the router first.
                await asyncio.sleep(0)
                opening = self._hub.open(conversation.spec, tenant, client, resumable=request.resumable)
        finally:
            line.close()

    def _opening(self, request: ChatRequest, tenant: Tenant, client: str) -> AbstractAsyncContextManager[Conversation]:
        if request.resume_token is None:
            spec = request.spec(self._model.default_voice)
            return self._hub.open(spec, tenant, client, resumable=request.resumable)
        ticket = self._tickets.read(request.resume_token, tenant)
        return self._hub.resume(ticket, tenant, client, Missed(request.have, request.replay))

    async def _hold(self, line: _Line, conversation: Conversation, request: ChatRequest) -> bool:
        """Until an end that is raised, or a restart: then True. A client that was lost is waited for, if it can know
        how to come back."""
        try:
            return await line.hold(conversation, self._metadata(conversation, request))
        except _ClientGone as gone:
            if line.introduced and not gone.hung_up:
                conversation.park()
            raise
        except (SlowClient, asyncio.CancelledError):  # out of reach; or the server is leaving
            if line.introduced:
                conversation.park()
            raise

    def _metadata(self, conversation: Conversation, request: ChatRequest) -> bytes:
        spec, holding = conversation.spec, conversation.holding
        resume = None
        if holding.resumable:
            token = self._tickets.issue(conversation.session, holding.serial, holding.tenant)
            resume = api_chat.Resumption(token, holding.serial > 0, conversation.first_frame)
        return api_chat.metadata(
            api_chat.conversation_metadata(
                session=conversation.session,
                voice=spec.voice,
                seed=spec.seed,
                text_temperature=spec.sampling.text_temperature,
                text_top_k=spec.sampling.text_top_k,
                audio_temperature=spec.sampling.audio_temperature,
                audio_top_k=spec.sampling.audio_top_k,
                model=self._model.name,
                trained=self._model.trained,
                audio_format=request.audio,
                not_applied=request.not_applied,
                resume=resume,
            )
        )


class _ClientGone(Exception):
    """The client closed the socket, or is out of reach. Nobody is left to be told. `hung_up`: it said goodbye."""

    def __init__(self, close_code: int = LOST) -> None:
        super().__init__(close_code)
        self.hung_up = close_code in HANGING_UP


class _Restart(Exception):
    """The client wants the same conversation from its beginning."""


class _Over(Exception):
    """The hub ended the conversation and there is nothing to say about it."""


class _Inbox:
    """What the client sent and the model has not heard: in order, bounded in bytes, nothing dropped.

    The reader must not wait for the model as long as this has room: it is also who sees a ping's answer and the
    client's end.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._events: deque[Audio | Control] = deque()
        self._bytes = 0
        self._limit_bytes = limit_bytes
        self._changed = asyncio.Event()

    async def put(self, event: Audio | Control) -> None:
        while self._bytes >= self._limit_bytes:
            await self._change()
        self._events.append(event)
        self._bytes += _cost(event)
        self._changed.set()

    async def get(self) -> Audio | Control:
        while not self._events:
            await self._change()
        event = self._events.popleft()
        self._bytes -= _cost(event)
        self._changed.set()
        return event

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _cost(event: Audio | Control) -> int:
    return _MESSAGE_COST_BYTES + (len(event.payload) if isinstance(event, Audio) else 0)


class _Line:
    """One client's socket with its codecs; outlives a restart, so that its audio streams go on unbroken."""

    def __init__(self, socket: WebSocket, request: ChatRequest, settings: ServeSettings) -> None:
        self._socket = socket
        self._settings = settings
        self._gate = SilenceGate() if request.silence_gate else None
        self._decoder: PayloadDecoder
        self._encoder: PayloadEncoder
        if request.audio == "opus":
            self._decoder, self._encoder = OpusPayloadDecoder(), OpusPayloadEncoder(settings.opus_complexity)
        else:
            self._decoder, self._encoder = PcmPayloadDecoder(request.pcm_rate_hz), PcmPayloadEncoder()
        self._told: set[str] = set()  # kinds whose being ignored the client has been told of
        self._counts = request.resumable  # the client counts frames by the messages that bring them
        self.introduced = False  # the client has been told what it talks to, and how it may come back

    def close(self) -> None:
        self._decoder.close()
        self._encoder.close()

    async def hold(self, conversation: Conversation, metadata: bytes) -> bool:
        """Until an end that is raised, or a restart: then True. False once the conversation was ended by the hub."""
        self.introduced = False
        inbox = _Inbox(self._settings.max_message_bytes)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(inbox))
                tasks.create_task(self._feed(inbox, conversation))
                tasks.create_task(self._speak(conversation, metadata))
                tasks.create_task(conversation.watch())
        except ExceptionGroup as group:
            first = group.exceptions[0]  # the others fell over it
            if isinstance(first, _Restart):
                return True
            if isinstance(first, _Over):
                return False
            if isinstance(first, IdleClient) and self._decoder.mid_page:
                raise IdleClient(f"{first.message} The last Ogg page is incomplete.", first.next_step) from first
            raise first from None
        return False

    # The client's side

    async def _read(self, inbox: _Inbox) -> NoReturn:
        while True:
            message = await self._receive()
            event = api_chat.parse_message(message, self._settings.max_message_bytes)
            match event:
                case Audio():
                    await inbox.put(event)
                case Steer(control):
                    await inbox.put(control)
                case Ping() | NotApplied() | Hello():
                    await self._answer(event)

    async def _receive(self) -> bytes | str:
        try:
            message = await self._socket.receive()
        except (WebSocketDisconnect, RuntimeError) as error:  # starlette raises the latter once it is closed
            raise _ClientGone from error
        if message["type"] == "websocket.disconnect":
            raise _ClientGone(message.get("code") or LOST)
        data = message.get("bytes")
        return data if data is not None else str(message.get("text", ""))

    async def _answer(self, event: Event) -> None:
        if isinstance(event, Ping):
            await self._send(api_chat.ping(event.payload))
        elif isinstance(event, NotApplied) and event.what not in self._told:
            self._told.add(event.what)
            if event.what == "error":
                log.info("a client reports: %.200s", event.text)
            else:
                await self._send(api_chat.metadata({"not_applied": [event.what]}))

    async def _feed(self, inbox: _Inbox, conversation: Conversation) -> NoReturn:
        """Decodes as fast as the conversation takes frames: a message of hours costs the memory of one frame."""
        await conversation.ready()
        paused = False
        try:
            while True:
                match await inbox.get():
                    case Audio(payload):
                        for pcm in self._decoder.frames(payload):
                            if not paused:
                                await conversation.send(pcm)
                    case Control.END_TURN:
                        for pcm in self._decoder.flush():
                            await conversation.send(pcm)
                    case Control.RESTART:
                        raise _Restart
                    case Control.PAUSE:
                        paused = True
                    case Control.START:
                        paused = False
        except AudioError as error:
            raise ProtocolError(f"The audio cannot be read: {error}.", api_chat.INVALID_PAYLOAD) from error

    # The agent's side

    async def _speak(self, conversation: Conversation, metadata: bytes) -> NoReturn:
        await conversation.ready()
        await self._send(api_chat.handshake())
        await self._send(metadata)
        self.introduced = True
        number = conversation.first_frame
        async for frame in conversation.frames():
            for _ in range(frame.key.frame - number if self._counts else 0):
                await self._send(api_chat.audio(b""))  # dropped: the client was too slow for it
            number = frame.key.frame + 1
            if not len(frame.pcm) or (self._gate is not None and not self._gate.passes(frame.pcm)):
                self._encoder.skip()
                if self._counts:
                    await self._send(api_chat.audio(b""))
            else:
                await self._send(api_chat.audio(self._encoder.encode(frame.pcm)))
            if frame.text:
                await self._send(api_chat.text(frame.text))
        raise _Over

    async def _send(self, message: bytes) -> None:
        try:
            await _within(self._socket.send_bytes(message), self._settings.stalled_client_s)
        except _ClientGone:
            await asyncio.sleep(CLOSE_FRAME_S)  # the reader knows better why, if it is told
            raise


async def _within(sending: Awaitable[None], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await sending
    except TimeoutError:
        raise SlowClient(f"The client took nothing for {timeout_s:g} s.") from None
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        raise _ClientGone from error


async def _farewell(socket: WebSocket, sentence: str, code: int) -> None:
    """The reason in full as a message, and as much of it as fits in the close frame."""
    try:
        await _within(socket.send_bytes(api_chat.error(sentence)), FAREWELL_S)
        await _within(socket.close(code, api_chat.close_reason(sentence)), FAREWELL_S)
    except (_ClientGone, SlowClient):
        log.debug("the client was gone before it could be told: %s", sentence)

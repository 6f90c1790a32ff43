"""One client's end of `/api/chat`: its socket, its codecs, what waits between them. Four tasks hold a conversation.

    read    socket → inbox          never waits for the model
    feed    inbox → decode → frames (80 ms, paced by the conversation)
    speak   prompt in → handshake; agent's frames → socket
    watch   the conversation fails → so do all

The first to end ends the others, and says why by what it raises.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from typing import NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from actors.errors import IdleClient, SlowClient
from serving.audio.errors import AudioError
from serving.audio.payload import (
    OpusPayloadDecoder,
    OpusPayloadEncoder,
    PayloadDecoder,
    PayloadEncoder,
    PcmPayloadDecoder,
    PcmPayloadEncoder,
)
from serving.audio.silence import SilenceGate
from serving.protocols import api_chat
from serving.protocols.api_chat import Audio, Control, Event, Hello, NotApplied, Ping, ProtocolError, Steer
from serving.protocols.chat_query import ChatRequest
from serving.session import Conversation
from serving.settings import ServeSettings

log = logging.getLogger(__name__)

LOST = 1006  # what stands for a close frame that never came, RFC 6455 section 7.1.5
HANGING_UP = (1000, 1001, 1005)  # done, the page is left, closed without a code: such a client does not come back
CLOSE_FRAME_S = 0.2  # after a write has failed: what a close frame says may be about to be read
_MESSAGE_COST_BYTES = 64  # what an empty message counts as in the inbox, so that a flood of them fills it too


class ClientGone(Exception):
    """The client closed the socket, or is out of reach. Nobody is left to be told. `hung_up`: it said goodbye."""

    def __init__(self, close_code: int = LOST) -> None:
        super().__init__(close_code)
        self.hung_up = close_code in HANGING_UP


class Restart(Exception):
    """The client wants the same conversation from its beginning."""


class _Over(Exception):
    """The hub ended the conversation and there is nothing to say about it."""


class Inbox:
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


class Line:
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
        self.acquainted = False  # it has spoken since, so it has been told

    def close(self) -> None:
        self._decoder.close()
        self._encoder.close()

    async def hold(self, conversation: Conversation, metadata: bytes) -> bool:
        """Until an end that is raised, or a restart: then True. False once the conversation was ended by the hub."""
        self.introduced = self.acquainted = False
        inbox = Inbox(self._settings.max_message_bytes)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(inbox))
                tasks.create_task(self._feed(inbox, conversation))
                tasks.create_task(self._speak(conversation, metadata))
                tasks.create_task(conversation.watch())
        except ExceptionGroup as group:
            first = group.exceptions[0]  # the others fell over it
            if isinstance(first, Restart):
                return True
            if isinstance(first, _Over):
                return False
            if isinstance(first, IdleClient) and self._decoder.mid_page:
                raise IdleClient(f"{first.message} The last Ogg page is incomplete.", first.next_step) from first
            raise first from None
        return False

    # The client's side

    async def _read(self, inbox: Inbox) -> NoReturn:
        while True:
            message = await self._receive()
            event = api_chat.parse_message(message, self._settings.max_message_bytes)
            match event:
                case Audio():
                    self.acquainted |= self.introduced
                    await inbox.put(event)
                case Steer(control):
                    await inbox.put(control)
                case Ping() | NotApplied() | Hello():
                    await self._answer(event)

    async def _receive(self) -> bytes | str:
        try:
            message = await self._socket.receive()
        except (WebSocketDisconnect, RuntimeError) as error:  # starlette raises the latter once it is closed
            raise ClientGone from error
        if message["type"] == "websocket.disconnect":
            raise ClientGone(message.get("code") or LOST)
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

    async def _feed(self, inbox: Inbox, conversation: Conversation) -> NoReturn:
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
                        raise Restart
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
            await within(self._socket.send_bytes(message), self._settings.stalled_client_s)
        except ClientGone:
            await asyncio.sleep(CLOSE_FRAME_S)  # the reader knows better why, if it is told
            raise


async def within(sending: Awaitable[None], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await sending
    except TimeoutError:
        raise SlowClient(f"The client took nothing for {timeout_s:g} s.") from None
    except (WebSocketDisconnect, RuntimeError, OSError) as error:
        raise ClientGone from error

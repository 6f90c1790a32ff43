"""`/api/chat` at the ingress: one WebSocket drives one conversation. The wire is serving/protocols/api_chat.py's.

    accept ─ key, query checked ─ slot taken, or a live one resumed ─ held (serving/chat_line.py) ─ told why it ended

How fast a client may send, and how long it may take nothing, serving/guard.py sees to where Serve meets the socket.
When the conversation is over the slot is given back, and then the client is told why: one message of kind 5 and a
close code. A client that was lost and holds a resume token is waited for instead. What a codec costs the event loop
per frame is in docs/decisions/opus.md; everything else here is microseconds.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from starlette.websockets import WebSocket

from actors.errors import ServingError, SlowClient
from graphs.stages import Sampling
from serving.audio.errors import LibopusMissingError
from serving.catalog import Catalog
from serving.chat_line import ClientGone, Line, within
from serving.errors import INTERNAL_ERROR, close_code
from serving.protocols import api_chat
from serving.protocols.api_chat import ProtocolError
from serving.protocols.chat_query import ChatRequest, parse_query
from serving.resume import Missed, Tickets
from serving.session import Conversation, ConversationHub
from serving.settings import ServeSettings
from serving.tenants import Tenant, Tenants

log = logging.getLogger(__name__)

FAREWELL_S = 2.0  # a client that does not take the reason for its end within this does not get it


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the metadata of a conversation says of the checkpoint, and what holds where its client leaves it open."""

    name: str
    trained: bool
    default_voice: str
    notice: str = ""  # see serving.catalog.Catalog
    sampling: Sampling = field(default_factory=Sampling)

    @classmethod
    def of(cls, catalog: Catalog) -> ServedModel:
        return cls(catalog.model, catalog.trained, catalog.default_voice, catalog.notice, catalog.sampling)


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
            request = parse_query(
                socket.query_params, role_max_chars=self._settings.role_max_chars, sampling=self._model.sampling
            )
            await self._converse(socket, request, tenant)
        except ClientGone:
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
        line = Line(socket, request, self._settings)
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

    async def _hold(self, line: Line, conversation: Conversation, request: ChatRequest) -> bool:
        """Until an end that is raised, or a restart: then True. A client that was lost is waited for, if it can know
        how to come back."""
        try:
            return await line.hold(conversation, self._metadata(conversation, request))
        except ClientGone as gone:
            self._park(line, conversation, hung_up=gone.hung_up)
            raise
        except (SlowClient, asyncio.CancelledError):  # out of reach; or the server is leaving
            self._park(line, conversation, hung_up=False)
            raise

    def _park(self, line: Line, conversation: Conversation, *, hung_up: bool) -> None:
        """Wait for a client that did not say goodbye. One that came back and loses patience before it has been told the
        next token does say so, and comes again with the last one, which is to open the conversation once more."""
        again = bool(conversation.holding.serial)
        if (line.introduced and not hung_up) or (again and not line.introduced):
            conversation.park()
            if again and not line.acquainted:
                conversation.holding.unspend()

    def _metadata(self, conversation: Conversation, request: ChatRequest) -> bytes:
        spec, holding = conversation.spec, conversation.holding
        resume = None
        if holding.resumable:
            token = self._tickets.issue(conversation.session, holding.serial, holding.tenant)
            resume = api_chat.Resumption(token, holding.serial > 0, conversation.first_frame, conversation.frames_sent)
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
                notice=self._model.notice,
                audio_format=request.audio,
                not_applied=request.not_applied,
                resume=resume,
            )
        )


async def _farewell(socket: WebSocket, sentence: str, code: int) -> None:
    """The reason in full as a message, and as much of it as fits in the close frame."""
    try:
        await within(socket.send_bytes(api_chat.error(sentence)), FAREWELL_S)
        await within(socket.close(code, api_chat.close_reason(sentence)), FAREWELL_S)
    except (ClientGone, SlowClient):
        log.debug("the client was gone before it could be told: %s", sentence)

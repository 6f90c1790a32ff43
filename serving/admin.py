"""What an operator, or a witness, may ask of a running system: its replicas, its conversations, their journals.

    GET  /admin/replicas                           all replicas, as the router knows them
    POST /admin/replicas/{name}/drain              have one emptied: its conversations move, then it is replaced
    GET  /admin/conversations                      those that this ingress carries, and which ingress it is
    GET  /admin/conversations/{session}/journal    ?from=N  what was said from frame N on, as far as it is kept

For whom: keys whose tenant has `admin = true` in the keys file. A server without keys listens on loopback alone, and
there everybody on the machine may ask; but no web page that happens to be open in a browser there.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request

from actors.errors import ReplicaLost, ServingError, Unauthorized, UnknownSession, from_code
from actors.journal import Journal
from actors.journal_parts import PartsBin
from actors.messages import Down, Failed, JournalAsk, JournalPart
from serving.relocation import TrunkSource
from serving.routing import Grant, RouterPort
from serving.session import Conversation, ConversationHub
from serving.settings import is_loopback
from serving.tenants import Tenants

ANSWER_S = 5.0


class JournalReader:
    """Journals of live conversations, wherever they are held: our own from memory, the others' from their replicas."""

    def __init__(self, hub: ConversationHub, router: RouterPort, trunks: TrunkSource) -> None:
        self._hub = hub
        self._router = router
        self._trunks = trunks
        self._asking: dict[str, asyncio.Lock] = {}  # one answer at a time: both would come under the same name

    async def read(self, session: str, first: int) -> dict[str, Any]:
        """Epoch, replica and the frames from `first` on. Raises UnknownSession, ReplicaLost."""
        own = self._hub.find(session)
        if own is not None:
            home = own.residence.home
            view = journal_view(own.journal, own.epoch, "" if home is None else home.replica, first)
            return view | {"apart": own.residence.apart}
        grant = await self._router.locate(session)
        if grant is None:
            raise UnknownSession(f"There is no conversation {session}.", "Ask /admin/conversations at its ingress.")
        lock = self._asking.setdefault(session, asyncio.Lock())
        try:
            async with lock:
                journal = await self._ask(grant, first)
        finally:
            if not lock.locked():
                self._asking.pop(session, None)
        return journal_view(journal, grant.epoch, grant.replica, first)

    async def _ask(self, grant: Grant, first: int) -> Journal:
        trunk = await self._trunks.get(grant.address)
        answer = _Answer()
        trunk.attach(grant.session, grant.epoch, answer.take)
        try:
            await trunk.send(JournalAsk(grant.session, grant.epoch, first))
            async with asyncio.timeout(ANSWER_S):
                await answer.over.wait()
        except TimeoutError:
            raise ReplicaLost("The replica did not hand its journal out in time.", "Ask again.") from None
        finally:
            trunk.detach(grant.session, grant.epoch)
        if answer.failure is not None:
            raise answer.failure
        return Journal.from_bytes(answer.parts.take(grant.session, grant.epoch))


class _Answer:
    """Collects the parts of one journal."""

    def __init__(self) -> None:
        self.parts = PartsBin()
        self.failure: ServingError | None = None
        self.over = asyncio.Event()

    def take(self, message: Down) -> None:
        try:
            if isinstance(message, Failed):
                raise from_code(message.code, message.message)
            if isinstance(message, JournalPart) and self.parts.add(message, 0.0):
                self.over.set()
        except ServingError as error:
            self.failure = error
            self.over.set()


def journal_view(journal: Journal, epoch: int, replica: str, first: int) -> dict[str, Any]:
    """What can be told of a journal: the text token of a frame is what the next row began with."""
    rows, codes = journal.rows, journal.agent_codes
    start = max(first, codes.start, rows.start - 1)
    end = journal.next_frame
    texts = [int(row[0]) for row in rows.rows(min(start + 1, end), end)]
    texts += [int(journal.pending[0, 0])] if len(journal.pending) and start < end else []
    frames = [
        {"frame": frame, "text_token": text, "codes": spoken.tolist()}
        for frame, text, spoken in zip(range(start, end), texts, codes.rows(min(start, end), end), strict=False)
    ]
    return {
        "session": journal.session,
        "epoch": epoch,
        "replica": replica,
        "seed": str(journal.spec.seed),  # a string: JavaScript's numbers end at 2**53
        "numerics_id": journal.numerics_id,
        "next_frame": end,
        "first_row": journal.first_row,
        "frames": frames,
    }


def admin_routes(hub: ConversationHub, router: RouterPort, trunks: TrunkSource, tenants: Tenants) -> APIRouter:
    """The routes under /admin."""
    reader = JournalReader(hub, router, trunks)
    routes = APIRouter(prefix="/admin")

    @routes.get("/replicas")
    async def replicas(request: Request) -> dict[str, Any]:
        authorize(request, tenants)
        return {"object": "list", "data": [asdict(view) for view in await router.replicas()]}

    @routes.post("/replicas/{name:path}/drain", status_code=202)
    async def drain(request: Request, name: str) -> dict[str, str]:
        authorize(request, tenants)
        await router.drain(name)
        return {"replica": name, "status": "draining"}

    @routes.get("/conversations")
    async def conversations(request: Request) -> dict[str, Any]:
        authorize(request, tenants)
        # Whoever answers is one ingress of several; its process is what a profiler, or a signal, is given.
        asked = {"ingress": hub.place.ingress, "node": hub.place.node, "process": os.getpid()}
        return {"object": "list", **asked, "data": [_conversation_view(each) for each in hub.conversations]}

    @routes.get("/conversations/{session}/journal")
    async def journal(
        request: Request, session: str, first: Annotated[int, Query(alias="from", ge=0, lt=1 << 40)] = 0
    ) -> dict[str, Any]:
        authorize(request, tenants)
        return await reader.read(session, first)

    return routes


def authorize(request: Request, tenants: Tenants) -> None:
    """Raises Unauthorized."""
    tenant = tenants.authenticate(request.headers, request.query_params)
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Unauthorized("Another site's page may not ask this.", "Ask without a browser.")
    if not tenant.admin and not (tenants.open and is_loopback(urlsplit(f"//{host}").hostname or "")):
        raise Unauthorized("This key may not look after the system.", "Use one of a tenant with `admin = true`.")


def _conversation_view(conversation: Conversation) -> dict[str, Any]:
    residence, home = conversation.residence, conversation.residence.home
    return {
        "session": conversation.session,
        "epoch": conversation.epoch,
        "tenant": conversation.holding.tenant.name,
        "replica": None if home is None else home.replica,
        "settled": residence.settled,
        "apart": residence.apart,
        "parked": conversation.parked,
        "frames_heard": conversation.frames_sent,
        "frames_answered": conversation.frames_answered,
        "recoveries": residence.recoveries,
        "moves": residence.moves,
        "exact": residence.exact,
    }

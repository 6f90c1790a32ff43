"""One ingress's connection at its replica: what it opened there, what it sends, and what waits to be sent to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from typing import Protocol

from websockets.asyncio.server import ServerConnection

from actors.errors import JournalError, ServingError, UnknownSession
from actors.journal import Journal
from actors.journal_parts import PartsBin, cut
from actors.messages import (
    CloseRequest,
    Down,
    DownSink,
    Failed,
    FrameIn,
    JournalAsk,
    JournalPart,
    OpenRequest,
    Up,
)
from serving import trunk_protocol as wire
from serving.trunk_pulse import binary

log = logging.getLogger(__name__)

BATCH = 512  # messages at most in one of the trunk: 2 MB of frames, of the 8 that the other end takes


class ReplicaPort(Protocol):
    """What the trunk needs of a replica; actors.replica.Replica is one."""

    async def open(self, request: OpenRequest, sink: DownSink, journal: Journal | None = None) -> None: ...

    def offer(self, frame: FrameIn) -> None: ...

    async def close(self, session: str, epoch: int, reason: str, sink: DownSink | None = None) -> None: ...

    def leave(self, session: str, epoch: int, sink: DownSink) -> None: ...

    def journal(self, session: str, epoch: int) -> Journal: ...


class Outbox:
    """What waits for the socket. Frames pass the parts of journals, of which one goes into each batch; but whatever
    belongs to the conversation of a part stays behind it, in order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ready: deque[Down] = deque()
        self._behind: deque[Down] = deque()  # parts, and what must not pass them
        self._held: Counter[tuple[str, int]] = Counter()  # whose messages are in _behind
        self._wake = asyncio.Event()

    def put(self, message: Down) -> bool:
        """Never blocks. False, and nothing is taken, when more waits than the socket has taken for long."""
        if len(self._ready) + len(self._behind) >= self._limit:
            return False
        owner = wire.owner_of(message)
        if isinstance(message, JournalPart) or owner in self._held:
            self._behind.append(message)
            self._held[owner] += 1
        else:
            self._ready.append(message)
        self._wake.set()
        return True

    def holds(self, session: str, epoch: int) -> bool:
        """Whether parts of this conversation's journal are still to be sent."""
        return (session, epoch) in self._held

    async def batch(self) -> list[Down]:
        """Waits until there is something to send, and takes it."""
        await self._wake.wait()
        taken = [self._ready.popleft() for _ in range(min(BATCH, len(self._ready)))]
        part_taken = False
        while self._behind and len(taken) < 2 * BATCH:
            if isinstance(self._behind[0], JournalPart):
                if part_taken:
                    break
                part_taken = True
            message = self._behind.popleft()
            owner = wire.owner_of(message)
            self._held[owner] -= 1
            if not self._held[owner]:
                del self._held[owner]
            taken.append(message)
        if not self._ready and not self._behind:
            self._wake.clear()
        return taken


class Link:
    """Made once the connection has greeted. `run`, then `leave_sessions`, whatever ended it."""

    def __init__(self, connection: ServerConnection, replica: ReplicaPort, version: int, max_outbox: int) -> None:
        self._connection = connection
        self._replica = replica
        self._version = version  # agreed with the ingress; one of 1 is not told what came with 2
        self._outbox = Outbox(max_outbox)
        self._parts = PartsBin()
        self._opened: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the connection ends. Raises ConnectionClosed or TrunkProtocolError."""
        sender = asyncio.create_task(self._send_all())
        receiver = asyncio.create_task(self._receive_all())
        try:
            done, _ = await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (sender, receiver):
                task.cancel()
            await asyncio.gather(sender, receiver, return_exceptions=True)

    async def leave_sessions(self) -> None:
        """Nobody carries these conversations any more: their slots are freed now, or wait for their clients."""
        opened, self._opened = self._opened, {}
        self._parts = PartsBin()
        for session, epoch in opened:
            self._replica.leave(session, epoch, self.sink)
        for opening in opened.values():
            opening.cancel()  # after `leave`: a conversation that waits for its client goes on opening
        await asyncio.gather(*opened.values(), *self._closing, return_exceptions=True)

    def sink(self, message: Down) -> None:
        """Queue a message; never blocks. An ingress that does not drain 2 s of everything is cut off."""
        if wire.since(message) <= self._version and not self._outbox.put(message):
            self._connection.transport.abort()

    async def _send_all(self) -> None:
        while True:
            await self._connection.send(wire.encode_batch(await self._outbox.batch()))

    async def _receive_all(self) -> None:
        while True:
            for message in wire.decode_up(await binary(self._connection)):
                self._receive(message)

    def _receive(self, message: Up) -> None:
        if isinstance(message, FrameIn):
            self._offer(message)
        elif isinstance(message, OpenRequest):
            key = (message.session, message.epoch)
            if key not in self._opened:  # else a repeated request: the first one's answer stands
                self._opened[key] = asyncio.create_task(self._open(message))
        elif isinstance(message, JournalPart):
            self._take_part(message)
        elif isinstance(message, JournalAsk):
            self._show(message)
        else:
            self._close(message)

    def _offer(self, frame: FrameIn) -> None:
        try:
            self._replica.offer(frame)
        except ServingError as error:
            self._fail(frame.key.session, frame.key.epoch, error)
        except Exception:  # as below: one conversation's end and no other's
            log.exception("frame %d of %s failed", frame.key.frame, frame.key.session)
            self._fail(frame.key.session, frame.key.epoch, ServingError("A frame could not be taken."))

    def _take_part(self, part: JournalPart) -> None:
        try:
            self._parts.add(part, time.monotonic())
        except JournalError as error:
            self._fail(part.session, part.epoch, error)

    async def _open(self, request: OpenRequest) -> None:
        try:
            journal = None
            if request.journal_bytes:
                blob = self._parts.take(request.session, request.epoch)
                if len(blob) != request.journal_bytes:
                    raise JournalError(f"A journal of {len(blob)} bytes came, not of {request.journal_bytes}.")
                # Some 10 ms for four megabytes, which are not those of the frames that pass here meanwhile.
                journal = await asyncio.to_thread(Journal.from_bytes, blob)
            await self._replica.open(request, self.sink, journal)
        except ServingError as error:
            self._fail(request.session, request.epoch, error)
        except Exception:  # whatever it is, it is this one conversation's end and no other's
            log.exception("open of %s failed", request.session)
            self._fail(request.session, request.epoch, ServingError("The conversation could not be opened."))

    def _show(self, ask: JournalAsk) -> None:
        """Sends an excerpt of a journal. One that is on its way already answers this as well."""
        if self._outbox.holds(ask.session, ask.epoch):
            return
        try:
            blob = self._replica.journal(ask.session, ask.epoch).excerpt(ask.first_row).to_bytes()
        except UnknownSession as error:
            self._fail(ask.session, ask.epoch, error)
            return
        for part in cut(ask.session, ask.epoch, blob):
            self.sink(part)

    def _close(self, asked: CloseRequest) -> None:
        self._parts.drop(asked.session, asked.epoch)
        opening = self._opened.pop((asked.session, asked.epoch), None)
        if opening is None:
            return  # never opened on this connection, so it is not this ingress's to close
        task = asyncio.create_task(self._close_after(opening, asked))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_after(self, opening: asyncio.Task[None], asked: CloseRequest) -> None:
        opening.cancel()  # if it is still at it; a replica's cancelled open leaves nothing behind
        await asyncio.gather(opening, return_exceptions=True)
        try:
            await self._replica.close(asked.session, asked.epoch, asked.reason, self.sink)
        except ServingError as error:
            log.info("close of %s: %s", asked.session, error)  # it had ended by itself

    def _fail(self, session: str, epoch: int, error: ServingError) -> None:
        self.sink(Failed(session, epoch, error.code, error.message))

"""How a replica speaks to a stage of its own node: a Unix socket, calls in order one way, their answers the other.

Ray starts the actors, tells when one does not come up, and ends them. What passes every 80 ms does not pass Ray: a
call of an actor costs both processes milliseconds of CPU, which is several times what the stage computes on a CPU
(docs/decisions/stage-link.md has the figures). On a GPU it is the host that saves them, out of the same 80 ms.

Nothing here knows Ray. Both ends are processes of one replica. The socket lies in a folder that no other user may
enter, and is gone from it once the one caller has connected; the caller's user is asked of the kernel all the same, and
what arrives is unpickled by `_Reader`, which knows what a replica and a stage exchange and makes nothing else.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import pickle
import shutil
import socket
import struct
import sys
import tempfile
import threading
import traceback
from collections import deque
from pathlib import Path
from typing import Any, cast

from actors.errors import ServingError
from actors.precedence import Precedence
from actors.promptly import at_leisure

log = logging.getLogger(__name__)

METHODS = frozenset({"open", "step", "rebuild", "close", "clear", "describe"})
LONGEST_PATH_BYTES = 100  # of a socket; Linux takes 107, macOS 103
_LENGTH = struct.Struct("!Q")
_THREAD = struct.Struct("!Q")  # the first that a stage says: which of its threads answers
_DONE, _REFUSED, _FAILED = range(3)

# Sampling lives in models.config, of whose classes none does more than hold values.
_OURS = frozenset({"graphs.stages", "models.config", "actors.stage_config", "actors.errors"})
_NUMPYS = frozenset({"_frombuffer", "_reconstruct", "dtype", "ndarray", "scalar"})  # what an array is put together by


class StageGone(Exception):
    """The process at the other end has gone, or what it answered cannot be read: all that it held is lost."""


class StageServer:
    """The stage's end: one caller, one call at a time, in the order they were made. For one thread."""

    def __init__(self, stage: object) -> None:
        """stage: whoever has METHODS."""
        self._stage = stage
        self._folder = _private_folder()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self.address)
            Path(self.address).chmod(0o600)
            self._socket.listen(1)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The socket's path."""
        return str(Path(self._folder) / "calls")

    def serve(self) -> None:
        """Answer the one caller until it has gone. An exception of the stage is an answer, not the end."""
        connection, _ = self._socket.accept()
        self.close()  # nobody else comes
        with connection, connection.makefile("rb") as calls:
            _check_user(connection)
            if not _said(connection, _THREAD.pack(threading.get_native_id())):
                return
            while True:
                head = calls.read(_LENGTH.size)
                if len(head) < _LENGTH.size:
                    return
                (length,) = _LENGTH.unpack(head)
                call = calls.read(length)
                if len(call) < length:
                    return
                if not _said(connection, self._answer(call)):
                    return

    def close(self) -> None:
        """Takes no caller any more. Twice is once."""
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self, call: bytes) -> bytes:
        try:
            method, arguments = _read(call)
            if method not in METHODS:
                raise ValueError(f"a stage has no {method}")
            return _framed((_DONE, getattr(self._stage, method)(*arguments)))
        except ServingError as refusal:
            return _framed((_REFUSED, refusal))
        except Exception:  # noqa: BLE001 - the caller decides what it means; it takes it for this stage's death
            return _framed((_FAILED, traceback.format_exc()))


class StageLink(asyncio.Protocol):
    """The replica's end. For one event loop."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._waiting: deque[asyncio.Future[Any]] = deque()  # in the order of their calls
        self._arrived = bytearray()
        self._precedence: Precedence | None = None  # none until the stage has said who answers
        self._gone: StageGone | None = None

    @classmethod
    async def to(cls, address: str) -> StageLink:
        """Raises OSError where there is no such socket: the stage runs on another machine."""
        _, link = await asyncio.get_running_loop().create_unix_connection(cls, address)
        return link

    async def call(self, method: str, *arguments: object, behind: bool = False) -> Any:
        """What the stage's method returned. Raises its ServingErrors as they are, and StageGone for whatever else it
        raised, and when it is gone. Cancelled, the call is made all the same, and its answer dropped.

        behind: it goes behind frames until `hurry` says that one waits for it.
        """
        if self._gone is not None:
            raise self._gone
        assert self._transport is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if behind and self._precedence is not None:
            self._precedence.behind()
        self._transport.write(_framed((method, arguments)))
        self._waiting.append(future)
        try:
            return await future
        finally:
            if behind:
                self.hurry()

    def hurry(self) -> None:
        """A frame waits for what the stage is at."""
        if self._precedence is not None:
            self._precedence.first()

    def close(self) -> None:
        """Speak to it no more; the stage's `serve` returns. Who waits for an answer is told that it is gone."""
        if self._transport is None or self._transport.is_closing():
            return
        self._precedence = None  # a call that ends with this raises nobody any more
        if (process := self._peer()) != os.getpid():
            at_leisure(process)
        self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._arrived += data
        if self._precedence is None and len(self._arrived) >= _THREAD.size:
            (thread,) = _THREAD.unpack_from(self._arrived)
            del self._arrived[: _THREAD.size]
            self._precedence = Precedence(self._peer(), thread)
        while len(self._arrived) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._arrived)
            end = _LENGTH.size + length
            if len(self._arrived) < end:
                return
            answer = bytes(memoryview(self._arrived)[_LENGTH.size : end])
            del self._arrived[:end]
            self._take(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = StageGone(f"The stage's process has gone{f': {exc}' if exc else ''}.")
        while self._waiting:
            _settle(self._waiting.popleft(), self._gone)

    def _peer(self) -> int:
        """The stage's process, as this one sees it; 0 where the kernel does not say."""
        assert self._transport is not None
        connection = self._transport.get_extra_info("socket")
        return _credentials(connection)[0] if sys.platform == "linux" else 0

    def _take(self, answer: bytes) -> None:
        future = self._waiting.popleft()
        try:
            how, what = _read(answer)
        except Exception as error:  # noqa: BLE001 - of whatever kind: see StageGone
            how, what = _FAILED, f"its answer cannot be read: {error!r}"
        if how == _DONE:
            if not future.done():
                future.set_result(what)
        else:
            _settle(future, what if how == _REFUSED else StageGone(f"The stage failed:\n{what}"))


class _Reader(pickle.Unpickler):
    """Builds the classes of `_OURS`, numpy's arrays and numbers, and Python's own containers; nothing else is called,
    whatever the bytes say."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _OURS and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module.partition(".")[0] == "numpy" and name in _NUMPYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no business between a replica and its stages")


def _read(message: bytes) -> Any:
    return _Reader(io.BytesIO(message)).load()


def _framed(message: object) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def _settle(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():  # nobody waits for one that was cancelled
        future.set_exception(error)


def _private_folder() -> str:
    """A new folder with mode 0700 whose path leaves room for a socket's name, which a TMPDIR may be too long for."""
    folder = tempfile.mkdtemp(prefix="stage-")
    if len(os.fsencode(folder)) + len("/calls") <= LONGEST_PATH_BYTES:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="stage-", dir="/tmp")


def _said(connection: socket.socket, message: bytes) -> bool:
    """Whether anybody was there to hear it: nobody waits for what a caller asked who has gone."""
    try:
        connection.sendall(message)
    except ConnectionError:
        return False
    return True


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of the other end, as Linux knows them."""
    process, user, group = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return process, user, group


def _check_user(connection: socket.socket) -> None:
    """Raises PermissionError unless the other end runs as this process's user, where the kernel says so."""
    if sys.platform == "linux":
        _, user, _ = _credentials(connection)
        if user != os.geteuid():
            raise PermissionError(f"user {user} has connected to a stage of user {os.geteuid()}")

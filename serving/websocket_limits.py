"""uvicorn's WebSockets, taught to say no so that it is heard.

Where a client breaks a limit below ASGI, stock uvicorn 0.54 answers in a way that gets lost:
- A frame above `ws_max_size`: it sends its close frame and shuts the socket while megabytes are still coming in. The
  kernel answers those with a reset, and most clients see a broken connection instead of code 1009. Here the rest is
  read and thrown away until the client falls silent, and then the socket is closed.
- A request line above websockets' 8 kB: the answer (414) is composed and never written; the client waits for ever.
  Here it is written. And the limit is one that a role of 4,000 characters fits into in any script: percent-encoded,
  a Korean one has 36 kB.
- A client that has stopped reading Opus: 10 s of it are 40 kB, which the buffers between here and there swallow. What
  tells is a ping, which is answered in its turn, when all that was sent before it has been read. Stock uvicorn pings
  every 20 s and waits 20 s more; here it takes 2 s and `unread_s`.
- A connection that is lost without a close frame is reported as 1005, as if the client had closed it without a code.
  Here it is 1006, which RFC 6455 (7.1.5) means by it: such a client may come back.

And one thing that stock uvicorn does too soon: a server that is to end hangs up on every open WebSocket (1012). Serve
ends the server of a leaving ingress to have its port closed (behind HAProxy, Ray 2.60), and waits for its calls only
then: all of them were cut by every deploy. Here those that are open stay until their handlers are done with them.
"""

from __future__ import annotations

from typing import Any

import uvicorn.protocols.websockets.auto
import websockets.http11
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

ABNORMAL_CLOSURE = 1006
LONGEST_LINE_BYTES = 256 * 1024
QUIET_S = 1.0  # a client that sent nothing for so long has stopped sending
LINGER_S = 15.0  # and one that never stops is cut
PING_EVERY_S = 2.0


class PatientWebSockets(WebSocketsSansIOProtocol):
    """Refuses as uvicorn does, and stays on the line until the refusal has arrived."""

    _refused_at_s: float | None = None
    unread_s = 10.0  # a client that has not read what was sent so long ago is cut

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.ping_interval, self.ping_timeout = PING_EVERY_S, self.unread_s

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()  # a close would wait until what lies here has been read

    def shutdown(self) -> None:
        """The server is to end, and takes nobody new; whoever ends it waits for those who talk, or for some of it."""
        if not self.handshake_complete or self.close_sent:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._refused_at_s is not None:
            self._linger()
            return
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse()

    def handle_parser_exception(self) -> None:
        """Called once the rest of the client's bytes cannot be read as frames: a close frame is ready to be sent."""
        closing = self.conn.close_sent
        if closing is not None:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": closing.code, "reason": closing.reason})
        self._refuse()

    def _refuse(self) -> None:
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        self._refused_at_s = self.loop.time()
        self.transport.resume_reading()
        self._linger()

    def _linger(self) -> None:
        """Close after a silence; each piece of what was not wanted puts it off, within limits."""
        assert self._refused_at_s is not None
        if self.close_timer is not None:
            self.close_timer.cancel()
        left_s = self._refused_at_s + LINGER_S - self.loop.time()
        self.close_timer = self.loop.call_later(max(0.0, min(QUIET_S, left_s)), self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._refused_at_s is not None and self.close_timer is not None:
            self.close_timer.cancel()
        if self.handshake_complete and self.conn.close_rcvd is None:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": ABNORMAL_CLOSURE})
        super().connection_lost(exc)


def install(unread_s: float = PatientWebSockets.unread_s) -> None:
    """Make every uvicorn that this process starts from now on use it. Serve offers no setting for the class."""
    auto: Any = uvicorn.protocols.websockets.auto
    PatientWebSockets.unread_s = unread_s
    auto.AutoWebSocketsProtocol = PatientWebSockets
    websockets.http11.MAX_LINE_LENGTH = max(websockets.http11.MAX_LINE_LENGTH, LONGEST_LINE_BYTES)

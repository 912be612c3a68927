# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 of uvicorn with limits for clients that are slow, silent or send too much."""

import asyncio
import contextlib
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds in which the headers of a request must be complete.
HEADERS_S = 10.0
# Seconds in which a client whose upload is refused can read why, and slow readers after Ctrl-C.
_LINGER_S = 0.5


class Protocol(H11Protocol):
    """One connection.

    A connection without complete headers is closed after `HEADERS_S`. The rest of a request that
    was answered before it was complete is not read. What is no HTTP, or has headers that are too
    long, gets one answer, and not that of the application. At the end of the server, connections
    that wait for their clients are closed at once; only those whose request is being answered stay.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self._lingering = _Lingering(transport, self)
        super().connection_made(self._lingering)  # pyright: ignore[reportArgumentType]
        self._limit_headers()

    def data_received(self, data: bytes) -> None:
        if not self._lingering.is_closing():
            super().data_received(data)
            self._limit_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        if self.sends_body():
            self.transport.close()
        super().on_response_complete()
        self._limit_headers()

    def shutdown(self) -> None:
        if self.cycle is None or self.sends_body() or self.transport.is_closing():
            self.transport.abort()
            return
        super().shutdown()
        if self.cycle.response_complete:
            self.loop.call_later(_LINGER_S, self.transport.abort)

    def sends_body(self) -> bool:
        """Whether the client has not yet sent all of its request, or does not send HTTP."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def send_400_response(self, msg: str) -> None:
        """Answers what h11 refuses, within the `except` clause of that error; see uvicorn."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        text = "the headers are too long" if status == 431 else f"this is not HTTP/1.1: {error}"
        content = json.dumps({"error": text}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        if self.cycle is not None and not self.cycle.response_complete:
            # What the application would send has no place on the connection any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        # The request may be answered already, or the answer have begun.
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=status, headers=[*headers, ("Connection", "close")]),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _limit_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Lingering:
    """A transport whose `close` lets a client that still sends read the answer first.

    If a socket is closed while bytes wait in it, its client gets an error in place of the answer.
    """

    def __init__(self, transport: Any, protocol: Protocol):
        self._transport, self._protocol = transport, protocol
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._protocol.sends_body():
            self._transport.close()
            return
        self._protocol.flow.pause_reading()
        self._lingers = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._protocol.loop.call_later(_LINGER_S, self._transport.abort)

"""The connection of a client: its requests are parsed and forwarded on a connection to the server that no other client uses.

Bytes are forwarded as they come, and a side that disconnects is disconnected on the other side at once. As two clients never share a
connection to the server, the bytes of one client cannot end up in the answer to another.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import Any

from drafttrain.recorder.closing import abort, linger
from drafttrain.recorder.framing import Body, Malformed, Request, request_head
from drafttrain.recorder.own_answers import LOOP_HEADER, STATUS_PATH, error_answer, status_answer
from drafttrain.recorder.relayed_exchange import RelayedExchange
from drafttrain.recorder.server_connection import ServerConnection
from drafttrain.recorder.shared_state import SharedState

CONNECT_SECONDS = 30.0


class ClientConnection(asyncio.Protocol):
    """Follows the requests of a client and forwards them."""

    transport: Any

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared
        # It takes its place now, because the connection is made some time later.
        shared.open.add(self)
        self.pending = deque[RelayedExchange]()
        """Requests whose answer is incomplete."""
        self.tunnel = False
        """The server has switched to another protocol; nothing is parsed any more."""
        self.server: ServerConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unread = b""
        self._body: Body | None = None
        self._current: RelayedExchange | None = None
        """The request whose body is being forwarded."""
        self._to_server: list[bytes] = []
        self._client_has_ended = False
        self._closing = False
        self._pauses = set[str]()
        self._last_progress: float | None = None
        """When an incomplete request began, or last made progress."""

    # ---------------------------------------------------------------- the connection

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        self._last_progress = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._closing:
            return
        self._unread = self._unread + data if self._unread else data
        self.forward_unread()

    def eof_received(self) -> bool:
        """See asyncio. The server decides what the end means: some servers stop, others still answer."""
        self._client_has_ended = True
        if self._closing or not (self.pending or self.tunnel or self._current or self._connecting):
            return False
        self._forward_end()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._closing = True
        self.leave()
        self._abort_unanswered()
        if self._connecting is not None:
            self._connecting.cancel()
        if self.server is not None:
            self.server.end(reset=error is not None)

    def leave(self) -> None:
        """Free the place of this client."""
        self.shared.open.discard(self)

    def write(self, data: bytes) -> None:
        """Send bytes to the client while it is connected."""
        if data and not self._closing and not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        """See asyncio."""
        if self.server is not None:
            self.server.pause()

    def resume_writing(self) -> None:
        """See asyncio."""
        if self.server is not None:
            self.server.resume()

    def pause(self, reason: str) -> None:
        """Stop reading from the client. Several reasons may hold at once."""
        if not self._pauses and not self.transport.is_closing():
            self.transport.pause_reading()
        self._pauses.add(reason)

    def resume(self, reason: str) -> None:
        """Remove a reason, and read again after the last one."""
        if reason in self._pauses:
            self._pauses.discard(reason)
            if self._last_progress is not None:
                self._last_progress = time.monotonic()
            if not self._pauses and not self.transport.is_closing():
                self.transport.resume_reading()

    # ---------------------------------------------------------------- requests

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""
        return not (self.pending or self.tunnel or self._current or self._unread)

    @property
    def counts(self) -> Counter[str]:
        """Requests by outcome."""
        return self.shared.counts

    def forward_unread(self) -> None:
        """Forward the bytes received so far, as far as possible."""
        try:
            while self._unread and not self._closing and self._step():
                pass
        except Malformed as error:
            if self.pending and self._current is None:
                # Earlier requests are answered first.
                self.pause("answer")
                return
            self.counts["malformed"] += 1
            self._refuse(error.status, str(error))

    def _step(self) -> bool:
        """Forward one head, or one piece of a body. Return whether more may follow."""
        if self.tunnel:
            data, self._unread = self._unread, b""
            self._send(data)
            return False
        if self._current is not None:
            return self._forward_body(self._current)
        if self.pending and self.pending[-1].request.leaves_http:
            # The answer decides whether the next bytes are a request at all.
            self.pause("answer")
            return False
        request = request_head(self._unread)
        if request is None:
            if self._last_progress is None:
                self._last_progress = time.monotonic()
            return False
        if self._is_answered_here(request):
            if self.pending:
                self.pause("answer")
                return False
            self._last_progress = None
            self._unread = self._unread[len(request.raw) :]
            self._answer_here(request)
            return False
        self._body = request.body()
        self._unread = self._unread[len(request.raw) :]
        self._begin(request)
        return True

    def _begin(self, request: Request) -> None:
        shared = self.shared
        exchange = RelayedExchange(request, shared.forwarded_head(request), shared.settings, shared.buffered)
        if exchange.waits_for_body and request.value(b"expect") == b"100-continue" and not self.pending:
            # The server cannot answer this: nothing is forwarded before the body is complete.
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._last_progress = time.monotonic()
        self._current = exchange
        self.pending.append(exchange)
        self._send(exchange.begin_request())
        self._end_body(exchange)

    def _forward_body(self, exchange: RelayedExchange) -> bool:
        assert self._body is not None
        content: list[bytes] = []
        end = self._body.feed(self._unread, 0, content)
        raw, self._unread = self._unread[:end], self._unread[end:]
        self._last_progress = time.monotonic()
        self._send(exchange.add_request_body(raw, content))
        self._end_body(exchange)
        return True

    def _end_body(self, exchange: RelayedExchange) -> None:
        assert self._body is not None
        if self._body.done:
            self._body = self._current = self._last_progress = None
            self._send(exchange.end_request())
            if exchange.answer_complete:
                self._finish(exchange)

    def _is_answered_here(self, request: Request) -> bool:
        return request.target.partition(b"?")[0] == STATUS_PATH.encode() or self.shared.is_loop(request)

    def _answer_here(self, request: Request) -> None:
        """Answer a request that is not forwarded. Its body is not read."""
        if request.values(LOOP_HEADER.lower()):
            self.counts["loops"] += 1
            self._refuse(508, "the upstream server sent the request back to this recorder")
            return
        self.transport.write(status_answer(self.shared.status(), with_body=request.method != b"HEAD"))
        self._close_after_answer()

    # ---------------------------------------------------------------- the server

    def _send(self, data: bytes) -> None:
        if not data:
            return
        if self.server is not None:
            self.server.write(data)
            return
        self._to_server.append(data)
        if self._connecting is None:
            self.pause("connecting")
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop, upstream = asyncio.get_running_loop(), self.shared.upstream
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await loop.create_connection(
                    lambda: ServerConnection(self), upstream.host, upstream.port, ssl=self.shared.tls
                )
        except (OSError, TimeoutError, UnicodeError) as error:
            # A host name that DNS cannot encode raises UnicodeError.
            self._connecting = None
            self._drop([*self.pending], "failed")
            self._refuse(502, f"cannot connect to the upstream server: {type(error).__name__}")

    def connected(self, server: ServerConnection) -> None:
        """Send the data that waited for the connection to the server."""
        self._connecting = None
        self.server = server
        if self._closing:
            server.end(reset=False)
            return
        for data in self._to_server:
            server.write(data)
        self._to_server = []
        self.resume("connecting")
        self.forward_unread()
        if self._client_has_ended:
            self._forward_end()

    def _forward_end(self) -> None:
        if self.server is None:
            return
        if self.shared.tls is not None:
            # TLS cannot close one direction of a connection.
            self.abort()
        else:
            self.server.write_end()

    # ---------------------------------------------------------------- answers

    def answered(self, exchange: RelayedExchange, *, tunnel: bool) -> None:
        """Note that the first pending request is answered."""
        self.pending.popleft()
        self.tunnel = self.tunnel or tunnel
        if exchange.request_complete:
            self._finish(exchange)
        if exchange.ends_connection or (self.shared.stopping and self.is_idle):
            self.close()
        else:
            self.resume("answer")
            if self._unread:
                asyncio.get_running_loop().call_soon(self.forward_unread)

    def _finish(self, exchange: RelayedExchange) -> None:
        assert exchange.answer is not None
        if not exchange.is_recorded:
            self.counts["passed"] += 1
        elif exchange.answer.status != 200:
            self.counts["failed"] += 1
        else:
            self.counts["offered"] += 1
            self.shared.offer(exchange)
        exchange.release()

    def _abort_unanswered(self) -> None:
        """Count the requests whose answer is incomplete."""
        current = self._current
        answered_early = [current] if current is not None and current.answer_complete else []
        self._drop([*self.pending, *answered_early], "aborted")

    def _drop(self, exchanges: list[RelayedExchange], outcome: str) -> None:
        """Count exchanges that failed, and follow none any more."""
        self.counts.update([outcome] * len(exchanges))
        for exchange in [*self.pending, *([self._current] if self._current else [])]:
            exchange.release()
        self.pending.clear()
        self._current = None

    # ---------------------------------------------------------------- the end

    def check_time(self, now: float) -> None:
        """End a request that the client does not finish in time."""
        limit = self.shared.settings.request_seconds
        is_late = self._last_progress is not None and now - self._last_progress > limit
        if not is_late or self._closing or self._pauses:
            return
        if self.pending and self._current is None:
            # An earlier request is still being answered.
            self._last_progress = now
            return
        has_begun = self._unread or self._current is not None
        if not has_begun:
            self.close()
            return
        self.counts["timed_out"] += 1
        self._refuse(408, "the client did not finish the request in time")

    def close(self) -> None:
        """Close after pending data is sent. Nothing is expected from the client."""
        self._closing = True
        if self.server is not None:
            self.server.end(reset=False)
        self.transport.close()

    def abort(self) -> None:
        """Close at once, so that the client notices it. Open requests are counted as aborted."""
        self._closing = True
        abort(self.transport, reset=True)

    def server_left(self, *, reset: bool) -> None:
        """Close as the server did."""
        self._abort_unanswered()
        if self._closing:
            return
        if reset:
            self.abort()
        else:
            self._close_after_answer()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer with an error, unless another answer has begun, and close. The server receives nothing more."""
        current = self._current
        others = [one for one in self.pending if one is not current]
        self._drop(others, "aborted")
        if others or (current is not None and current.answer is not None and not current.answer_complete):
            self.abort()
            return
        if current is None or not current.answer_complete:
            self.write(error_answer(status, reason))
        self._close_after_answer()

    def _close_after_answer(self) -> None:
        """Close once the client has received the answer."""
        if self._closing:
            return
        self._closing = True
        self._unread = b""
        if self.server is not None:
            self.server.end(reset=False)
        self._pauses.clear()
        seconds = self.shared.settings.request_seconds
        linger(self.transport, client_has_ended=self._client_has_ended, slow_client_seconds=seconds)

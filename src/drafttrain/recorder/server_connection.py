"""The recorder's connection to the server for one client: it follows the answers and passes them back."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Protocol

from drafttrain.recorder.closing import abort
from drafttrain.recorder.framing import Answer, Body, Malformed, UntilClosed, answer_head
from drafttrain.recorder.relayed_exchange import RelayedExchange


class AnsweredClient(Protocol):
    """The client that receives the answers."""

    tunnel: bool
    pending: deque[RelayedExchange]

    def connected(self, server: ServerConnection) -> None:
        """Send data that waited for the connection to the server."""

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""

    def pause(self, reason: str) -> None:
        """Stop reading from the client."""

    def resume(self, reason: str) -> None:
        """Read from the client again."""

    def answered(self, exchange: RelayedExchange, *, tunnel: bool) -> None:
        """Note that the first pending request is answered."""

    def server_left(self, *, reset: bool) -> None:
        """Close as the server did."""


class ServerConnection(asyncio.Protocol):
    """Follows the answers of the server on one connection and passes them back."""

    def __init__(self, client: AnsweredClient) -> None:
        self._client = client
        self._body: Body | None = None
        self._rest = b""
        self._is_opaque = False
        """The answer cannot be parsed: it is passed on and not recorded."""
        self._is_over = False
        self._has_sent_eof = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        self._client.connected(self)

    def write(self, data: bytes) -> None:
        """Send bytes to the server while it is connected."""
        if data and not self._is_over and not self._has_sent_eof and not self.transport.is_closing():
            self.transport.write(data)

    def write_end(self) -> None:
        """Tell the server that the client sends nothing more."""
        if not self._is_over and not self._has_sent_eof and not self.transport.is_closing():
            self._has_sent_eof = True
            self.transport.write_eof()

    def pause(self) -> None:
        """Stop reading from the server."""
        if not self._is_over and not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read from the server again."""
        if not self._is_over and not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        position = 0
        while position < len(data) and not self._is_over:
            start = position
            try:
                position = self._passed_back(data, position)
            except Malformed:
                self._is_opaque = True
                position = start
            if position == start and not self._is_opaque:
                self._rest = data[start:]
                return

    def eof_received(self) -> bool:
        """See asyncio."""
        self._server_left(reset=False)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._server_left(reset=error is not None)

    def pause_writing(self) -> None:
        """See asyncio."""
        self._client.pause("server")

    def resume_writing(self) -> None:
        """See asyncio."""
        self._client.resume("server")

    def end(self, *, reset: bool) -> None:
        """Disconnect from the server, which then stops generating."""
        self._is_over = True
        abort(self.transport, reset=reset)

    def _passed_back(self, data: bytes, position: int) -> int:
        """Pass back one head or one piece of a body. Return where it ends, or the same position if the head is incomplete."""
        client = self._client
        if self._is_opaque or client.tunnel or not client.pending:
            client.write(data[position:] if position else data)
            self._is_opaque = self._is_opaque or not client.tunnel
            return len(data)
        exchange = client.pending[0]
        if self._body is None:
            head = answer_head(data, position)
            if head is None:
                return position
            position += len(head.raw)
            if head.status // 100 == 1 and head.status != 101:
                client.write(head.raw)
                return position
            client.write(exchange.begin_answer(head))
            self._body = head.body(exchange.request)
            self._end_body(exchange, head)
            return position
        content: list[bytes] = []
        end = self._body.feed(data, position, content)
        client.write(exchange.add_answer_body(data[position:end], content))
        assert exchange.answer is not None
        self._end_body(exchange, exchange.answer)
        return end

    def _end_body(self, exchange: RelayedExchange, head: Answer) -> None:
        assert self._body is not None
        if self._body.done:
            self._body = None
            self._client.write(exchange.end_answer())
            connected = exchange.request.method == b"CONNECT" and head.status // 100 == 2
            self._client.answered(exchange, tunnel=head.status == 101 or connected)

    def _server_left(self, *, reset: bool) -> None:
        if self._is_over:
            return
        self._is_over = True
        client = self._client
        if self._rest:
            client.write(self._rest)
        if self._body is not None and isinstance(self._body, UntilClosed) and client.pending and not reset:
            client.write(client.pending[0].end_answer())
            client.answered(client.pending[0], tunnel=False)
        client.server_left(reset=reset)

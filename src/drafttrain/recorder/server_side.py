"""The server's connection for one client: its answers are followed and passed back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from drafttrain.recorder.framing import Answer, Body, Malformed, UntilClosed, answer_head
from drafttrain.recorder.passing import Passing
from drafttrain.recorder.relay import abort

if TYPE_CHECKING:
    from drafttrain.recorder.client_side import ClientSide


class ServerSide(asyncio.Protocol):
    """Follows the answers of the server on one connection, and passes them back."""

    def __init__(self, client: ClientSide) -> None:
        self._client = client
        self._body: Body | None = None
        self._rest = b""
        self._unread = False
        """What comes cannot be followed; it passes and nothing of it is recorded."""
        self._is_over = False
        self._has_end = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        self._client.connected(self)

    def write(self, data: bytes) -> None:
        """Send bytes to the server, where it is still there."""
        if data and not self._is_over and not self._has_end and not self.transport.is_closing():
            self.transport.write(data)

    def write_end(self) -> None:
        """Tell the server that the client sends nothing more."""
        if not self._is_over and not self._has_end and not self.transport.is_closing():
            self._has_end = True
            self.transport.write_eof()

    def read(self, *, on: bool) -> None:
        """Read on, or no more for now."""
        if not self._is_over and not self.transport.is_closing():
            if on:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        position = 0
        while position < len(data) and not self._is_over:
            start = position
            try:
                position = self._passed(data, position)
            except Malformed:
                self._unread = True
                position = start
            if position == start and not self._unread:
                self._rest = data[start:]
                return

    def eof_received(self) -> bool:
        """See asyncio."""
        self._left(reset=False)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._left(reset=error is not None)

    def pause_writing(self) -> None:
        """See asyncio."""
        self._client.pause("server")

    def resume_writing(self) -> None:
        """See asyncio."""
        self._client.resume("server")

    def end(self, *, reset: bool) -> None:
        """Leave the server, which then stops to write."""
        self._is_over = True
        abort(self.transport, reset=reset)

    def _passed(self, data: bytes, position: int) -> int:
        """Pass back one head or one piece of a body, and return where it ends; the same position: its end is not here yet."""
        client = self._client
        if self._unread or client.tunnel or not client.pending:
            client.write(data[position:] if position else data)
            self._unread = self._unread or not client.tunnel
            return len(data)
        passing = client.pending[0]
        if self._body is None:
            head = answer_head(data, position)
            if head is None:
                return position
            position += len(head.raw)
            if head.status // 100 == 1 and head.status != 101:
                client.write(head.raw)
                return position
            client.write(passing.answers(head))
            self._body = head.body(passing.request)
            self._end_body(passing, head)
            return position
        content: list[bytes] = []
        end = self._body.feed(data, position, content)
        client.write(passing.pass_back(data[position:end], content))
        assert passing.answer is not None
        self._end_body(passing, passing.answer)
        return end

    def _end_body(self, passing: Passing, head: Answer) -> None:
        assert self._body is not None
        if self._body.done:
            self._body = None
            self._client.write(passing.answered())
            connected = passing.request.method == b"CONNECT" and head.status // 100 == 2
            self._client.answered(passing, tunnel=head.status == 101 or connected)

    def _left(self, *, reset: bool) -> None:
        if self._is_over:
            return
        self._is_over = True
        client = self._client
        if self._rest:
            client.write(self._rest)
        if self._body is not None and isinstance(self._body, UntilClosed) and client.pending and not reset:
            client.write(client.pending[0].answered())
            client.answered(client.pending[0], tunnel=False)
        client.server_left(reset=reset)

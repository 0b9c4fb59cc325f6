"""A client's connection: its requests are followed and passed on, on a connection of its own to the server.

Bytes pass as they come, and so do ends: who leaves on one side is missed at once on the other. As no two clients share a
connection, what one of them sends can end up in no other's answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from typing import Any

from drafttrain.recorder.framing import Body, Malformed, Request, request_head
from drafttrain.recorder.passing import Passing
from drafttrain.recorder.relay import LINGER_SECONDS, LOOP_HEADER, STATUS_PATH, Relays, abort, error_answer
from drafttrain.recorder.server_side import ServerSide

CONNECT_SECONDS = 30.0


class ClientSide(asyncio.Protocol):
    """Follows the requests of a client, and passes them on."""

    transport: Any

    def __init__(self, relays: Relays) -> None:
        self.relays = relays
        # From now on it has a place, whenever its connection is made.
        relays.open.add(self)
        self.pending = deque[Passing]()
        """Requests whose answer is not whole."""
        self.tunnel = False
        """The server speaks another protocol from here on; nothing is read any more."""
        self.server: ServerSide | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unread = b""
        self._body: Body | None = None
        self._passing: Passing | None = None
        """The request whose body is passing."""
        self._to_server: list[bytes] = []
        self._has_left = False
        self._closing = False
        self._pauses = set[str]()
        self._since: float | None = None
        """When a request that is not whole was begun, or last went on."""

    # ---------------------------------------------------------------- the connection

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        self._since = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._closing:
            return
        self._unread = self._unread + data if self._unread else data
        self.go_on()

    def eof_received(self) -> bool:
        """See asyncio. The server decides what an end means: some stop, others still answer."""
        self._has_left = True
        if self._closing or not (self.pending or self.tunnel or self._passing or self._connecting):
            return False
        self._pass_end_on()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._closing = True
        self.relays.left(self)
        self.leave_pending()
        if self._connecting is not None:
            self._connecting.cancel()
        if self.server is not None:
            self.server.end(reset=error is not None)

    def write(self, data: bytes) -> None:
        """Send bytes to the client, where it is still there."""
        if data and not self._closing and not self.transport.is_closing():
            self.transport.write(data)

    def pause_writing(self) -> None:
        """See asyncio."""
        if self.server is not None:
            self.server.read(on=False)

    def resume_writing(self) -> None:
        """See asyncio."""
        if self.server is not None:
            self.server.read(on=True)

    def pause(self, why: str) -> None:
        """Read no more of the client for one of several reasons."""
        if not self._pauses and not self.transport.is_closing():
            self.transport.pause_reading()
        self._pauses.add(why)

    def resume(self, why: str) -> None:
        """Read on, where it was the last reason."""
        if why in self._pauses:
            self._pauses.discard(why)
            if self._since is not None:
                self._since = time.monotonic()
            if not self._pauses and not self.transport.is_closing():
                self.transport.resume_reading()

    # ---------------------------------------------------------------- requests

    def go_on(self) -> None:
        """Pass on what has come, as far as it may go now."""
        try:
            while self._unread and not self._closing and self._step():
                pass
        except Malformed as error:
            if self.pending and self._passing is None:
                # What was asked before is answered first.
                self.pause("answer")
                return
            self.counts["malformed"] += 1
            self._refuse(error.status, str(error))

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked that is not answered."""
        return not (self.pending or self.tunnel or self._passing or self._unread)

    @property
    def counts(self) -> Counter[str]:
        """Requests by what became of them."""
        return self.relays.counts

    def _step(self) -> bool:
        """Take one head, or one piece of a body, off what has come; return whether there may be more."""
        if self.tunnel:
            data, self._unread = self._unread, b""
            self._send(data)
            return False
        if self._passing is not None:
            return self._pass_body(self._passing)
        if self.pending and self.pending[-1].request.leaves_http:
            # The answer says whether what follows is a request at all.
            self.pause("answer")
            return False
        request = request_head(self._unread)
        if request is None:
            if self._since is None:
                self._since = time.monotonic()
            return False
        if self._is_ours(request):
            if self.pending:
                self.pause("answer")
                return False
            self._since = None
            self._unread = self._unread[len(request.raw) :]
            return self._answer_here(request)
        self._body = request.body()
        self._unread = self._unread[len(request.raw) :]
        self._begin(request)
        return True

    def _begin(self, request: Request) -> None:
        settings, held = self.relays.settings, self.relays.held
        passing = Passing(request, self.relays.forwarded(request), settings, held)
        if passing.waits_for_body and request.value(b"expect") == b"100-continue" and not self.pending:
            # Nothing is sent on before the body is here.
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._since = time.monotonic()
        self._passing = passing
        self.pending.append(passing)
        self._send(passing.asks())
        self._end_body(passing)

    def _pass_body(self, passing: Passing) -> bool:
        assert self._body is not None
        content: list[bytes] = []
        end = self._body.feed(self._unread, 0, content)
        raw, self._unread = self._unread[:end], self._unread[end:]
        self._since = time.monotonic()
        self._send(passing.ask(raw, content))
        self._end_body(passing)
        return True

    def _end_body(self, passing: Passing) -> None:
        assert self._body is not None
        if self._body.done:
            self._body = self._passing = self._since = None
            self._send(passing.asked())
            if passing.answered_whole:
                self._finish(passing)

    def _is_ours(self, request: Request) -> bool:
        return request.target.partition(b"?")[0] == STATUS_PATH.encode() or any(
            self.relays.identity in one for one in request.values(LOOP_HEADER.lower())
        )

    def _answer_here(self, request: Request) -> bool:
        """Answer a request that is not passed on."""
        if request.values(LOOP_HEADER.lower()):
            self.counts["loops"] += 1
            self._refuse(508, "a request of this recorder came back to it: the server behind it leads to itself")
            return False
        body = b"" if request.method == b"HEAD" else json.dumps(self.relays.status()).encode()
        lines = f"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        # Whatever body the request has is not read.
        self.transport.write(lines.encode() + b"Connection: close\r\n\r\n" + body)
        self._linger()
        return False

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
        loop, upstream = asyncio.get_running_loop(), self.relays.upstream
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await loop.create_connection(
                    lambda: ServerSide(self), upstream.host, upstream.port, ssl=self.relays.tls
                )
        except (OSError, TimeoutError, UnicodeError) as error:
            # The last one is a name that no DNS can hold.
            self._connecting = None
            self._drop([*self.pending], "failed")
            self._refuse(502, f"the server behind it cannot be reached: {type(error).__name__}")

    def connected(self, server: ServerSide) -> None:
        """Send what has waited for the connection to the server."""
        self._connecting = None
        self.server = server
        if self._closing:
            server.end(reset=False)
            return
        for data in self._to_server:
            server.write(data)
        self._to_server = []
        self.resume("connecting")
        self.go_on()
        if self._has_left:
            self._pass_end_on()

    def _pass_end_on(self) -> None:
        if self.server is None:
            return
        if self.relays.tls is not None:
            # TLS knows no half of a connection.
            self.abort()
        else:
            self.server.write_end()

    # ---------------------------------------------------------------- answers

    def answered(self, passing: Passing, *, tunnel: bool) -> None:
        """Note that the answer to the first request is whole."""
        self.pending.popleft()
        self.tunnel = self.tunnel or tunnel
        if passing.asked_whole:
            self._finish(passing)
        if passing.closes or (self.relays.stopping and self.is_idle):
            self.close()
        else:
            self.resume("answer")
            if self._unread:
                asyncio.get_running_loop().call_soon(self.go_on)

    def _finish(self, passing: Passing) -> None:
        assert passing.answer is not None
        if not passing.recorded:
            self.counts["passed"] += 1
        elif passing.answer.status != 200:
            self.counts["failed"] += 1
        else:
            self.counts["offered"] += 1
            self.relays.offer(passing)
        passing.end()

    def leave_pending(self) -> None:
        """Count what is not answered to its end."""
        early = [self._passing] if self._passing is not None and self._passing.answered_whole else []
        self._drop([*self.pending, *early], "aborted")

    def _drop(self, requests: list[Passing], why: str) -> None:
        """Count requests that come to nothing, and follow none any more."""
        self.counts.update([why] * len(requests))
        for passing in [*self.pending, *([self._passing] if self._passing else [])]:
            passing.end()
        self.pending.clear()
        self._passing = None

    # ---------------------------------------------------------------- ends

    def check_time(self, now: float) -> None:
        """End a request that is not sent to its end in time."""
        late = self._since is not None and now - self._since > self.relays.settings.request_seconds
        if not late or self._closing or self._pauses:
            return
        if self.pending and self._passing is None:
            # An earlier request is still answered.
            self._since = now
            return
        began = self._unread or self._passing is not None
        if not began:
            self.close()
            return
        self.counts["timed_out"] += 1
        self._refuse(408, "the request was not sent to its end in time")

    def close(self) -> None:
        """Close after what was written is sent; of the client nothing is on its way."""
        self._closing = True
        if self.server is not None:
            self.server.end(reset=False)
        self.transport.close()

    def abort(self) -> None:
        """Close at once, so that it is seen; what is open is counted as aborted."""
        self._closing = True
        abort(self.transport, reset=True)

    def server_left(self, *, reset: bool) -> None:
        """End as the server did."""
        self.leave_pending()
        if self._closing:
            return
        if reset:
            self.abort()
        else:
            self._linger()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer with an error where no other answer has begun, and close; the server gets nothing more."""
        current = self._passing
        others = [one for one in self.pending if one is not current]
        self._drop(others, "aborted")
        if others or (current is not None and current.answer is not None and not current.answered_whole):
            self.abort()
            return
        if current is None or not current.answered_whole:
            self.write(error_answer(status, reason))
        self._linger()

    def _linger(self) -> None:
        """Send what is left and the end; read on for a moment, so that the client gets it."""
        if self._closing:
            return
        self._closing = True
        self._unread = b""
        if self.server is not None:
            self.server.end(reset=False)
        self._pauses.clear()
        if self.transport.is_closing():
            return
        self.transport.resume_reading()
        if self._has_left:
            self.transport.close()
            return
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._after_lingering)

    def _after_lingering(self, before: int = 0) -> None:
        left = 0 if self.transport.is_closing() else self.transport.get_write_buffer_size()
        if left == before:
            # It has all, or takes nothing.
            self.transport.abort()
        else:
            # A slow client may need longer for what is already its own.
            seconds = self.relays.settings.request_seconds
            asyncio.get_running_loop().call_later(seconds, self._after_lingering, left)

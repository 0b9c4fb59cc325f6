"""Two connections that belong together: a client's, and one of its own to the server.

Bytes pass as they come, and so do ends: who leaves on one side is missed at once on the other. As no two clients share a
connection, what one of them sends can end up in no other's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from drafttrain.online.framing import Answer, Body, Malformed, Request, UntilClosed, answer_head, request_head
from drafttrain.online.passing import Held, Passing
from drafttrain.online.recorder_settings import RecorderSettings
from drafttrain.online.upstream import Upstream

STATUS_PATH = "/_recorder"
"""Answered here and not passed on: counts as JSON."""
LOOP_HEADER = b"Drafttrain-Recorder"
"""Names each recorder that a request went through. Not Via: servers stop to compress where they see it."""
CONNECT_SECONDS = 30.0
LINGER_SECONDS = 2.0
"""A client may still be sending when it is refused, and would lose the answer to a connection that is closed."""
RESET = struct.pack("ii", 1, 0)
REASONS = {
    400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 502: "Bad Gateway", 503: "Service Unavailable",
    508: "Loop Detected",
}  # fmt: skip


class Relays:
    """What all connections share.

    Args:
        offer: Takes what was recorded: what passed, or why it is not kept.
        status: The counts as the status page shows them.
    """

    def __init__(
        self,
        settings: RecorderSettings,
        upstream: Upstream,
        *,
        identity: str,
        offer: Callable[[Passing], None],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.identity = identity.encode()
        self.offer = offer
        self.status = status
        self.counts = Counter[str]()
        """Requests by what became of them."""
        self.open = set[ClientSide]()
        self.refused = set[RefusedSide]()
        self.most_clients = settings.max_clients
        self.most_refused = settings.max_clients
        self.held = Held(settings.queue_bytes)
        self.stopping = False
        self.tls = ssl.create_default_context() if upstream.scheme == "https" else None

    def accepted(self) -> ClientSide | RefusedSide:
        """Return what talks to a client that has just connected."""
        return RefusedSide(self) if len(self.open) >= self.most_clients else ClientSide(self)

    def left(self, side: ClientSide | RefusedSide) -> None:
        """Free the place of a client."""
        self.open.discard(side)  # type: ignore[arg-type]
        self.refused.discard(side)  # type: ignore[arg-type]

    def watch(self) -> None:
        """End requests that are not sent to their end."""
        now = time.monotonic()
        for side in [*self.open]:
            side.check_time(now)

    def forwarded(self, request: Request) -> bytes:
        """Return the head of a request as the server gets it: its own name in place of the recorder's, and the recorder's mark."""
        target = request.target
        if self.upstream.path:
            before, scheme, rest = target.partition(b"://")
            authority, slash, path = rest.partition(b"/")
            prefix = self.upstream.path.encode()
            if target.startswith(b"/"):
                target = prefix + target
            elif scheme:
                target = before + scheme + authority + prefix + slash + path
        added = [LOOP_HEADER + b": " + self.identity]
        if self.upstream.authorization and not request.values(b"authorization"):
            added.append(b"Authorization: " + self.upstream.authorization)
        return request.rewritten(
            line=b"%b %b HTTP/1.%b" % (request.method, target, request.minor),
            replaced={b"host": b"Host: " + self.upstream.authority.encode()},
            added=added,
        )


class RefusedSide(asyncio.Protocol):
    """A client beyond the bound: it is told, and its bytes are not read."""

    def __init__(self, relays: Relays) -> None:
        self._relays = relays
        relays.counts["refused"] += 1
        relays.refused.add(self)

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        transport.write(error_answer(503, "the recorder serves as many clients as it may", "Retry-After: 1"))
        transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

    def eof_received(self) -> bool:
        """See asyncio."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._relays.left(self)


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
    def is_closed(self) -> bool:
        """Whether nothing more passes, as the client was sent its end."""
        return self._closing

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
        elif not self.server.transport.is_closing():
            self.server.transport.write_eof()

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
        """Close after what was written is sent."""
        self._linger()

    def abort(self) -> None:
        """Close at once, so that it is seen; what is open is counted as aborted."""
        self._closing = True
        _abort(self.transport, reset=True)

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

    def _after_lingering(self) -> None:
        # A slow client may need longer for what is already its own.
        if self.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._after_lingering)
        else:
            self.transport.close()


class ServerSide(asyncio.Protocol):
    """Follows the answers of the server on one connection, and passes them back."""

    def __init__(self, client: ClientSide) -> None:
        self._client = client
        self._body: Body | None = None
        self._rest = b""
        self._unread = False
        """What comes cannot be followed; it passes and nothing of it is recorded."""
        self._is_over = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self.transport = transport
        self._client.connected(self)

    def write(self, data: bytes) -> None:
        """Send bytes to the server, where it is still there."""
        if data and not self._is_over and not self.transport.is_closing():
            self.transport.write(data)

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
        _abort(self.transport, reset=reset)

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


def error_answer(status: int, reason: str, *headers: str) -> bytes:
    """Return an answer in the form of the OpenAI protocol, after which the connection is closed."""
    kind = REASONS[status].lower().replace(" ", "_")
    body = json.dumps({"error": {"message": f"recorder: {reason}", "type": kind}}).encode()
    lines = [
        f"HTTP/1.1 {status} {REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _abort(transport: Any, *, reset: bool) -> None:
    """Close at once; with a reset the other side sees that something is missing."""
    if reset and (found := transport.get_extra_info("socket")) is not None:
        # Not all loops let a transport's socket be set.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()

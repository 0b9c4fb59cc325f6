"""What all connections of the recorder share, and what it answers itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drafttrain.recorder.framing import Request
from drafttrain.recorder.passing import Held, Passing
from drafttrain.recorder.settings import RecorderSettings
from drafttrain.recorder.upstream import Upstream

if TYPE_CHECKING:
    from drafttrain.recorder.client_side import ClientSide

STATUS_PATH = "/_recorder"
"""Answered here and not passed on: counts as JSON."""
LOOP_HEADER = b"Drafttrain-Recorder"
"""Names each recorder that a request went through. Not Via: servers stop to compress where they see it."""
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
        self.open: set[ClientSide] = set()
        self.refused = set[RefusedSide]()
        self.most_clients = settings.max_clients
        self.most_refused = settings.max_clients
        self.held = Held(settings.queue_bytes)
        self.stopping = False
        self.tls = ssl.create_default_context() if upstream.scheme == "https" else None

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


def abort(transport: Any, *, reset: bool) -> None:
    """Close at once; with a reset the other side sees that something is missing."""
    if reset and (found := transport.get_extra_info("socket")) is not None:
        # Not all loops let a transport's socket be set.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()

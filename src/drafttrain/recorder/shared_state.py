"""State that all connections of the recorder share: settings, counts, open connections and buffered bytes."""

from __future__ import annotations

import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from drafttrain.recorder.framing import Request
from drafttrain.recorder.own_answers import LOOP_HEADER
from drafttrain.recorder.relayed_exchange import BufferedBytes, RelayedExchange
from drafttrain.recorder.settings import RecorderSettings
from drafttrain.recorder.upstream import Upstream


class OpenConnection(Protocol):
    """What the recorder does with the connection of a client."""

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""

    def check_time(self, now: float) -> None:
        """End a request that the client does not finish in time."""

    def close(self) -> None:
        """Close after pending data is sent."""

    def abort(self) -> None:
        """Close at once."""


class SharedState:
    """State that all connections share.

    Args:
        identity: Name of this recorder in `LOOP_HEADER`.
        offer: Receives each finished exchange for recording.
        status: Returns the counts that the status page shows.
    """

    def __init__(
        self,
        settings: RecorderSettings,
        upstream: Upstream,
        *,
        identity: str,
        offer: Callable[[RelayedExchange], None],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.settings = settings
        self.upstream = upstream
        self.identity = identity.encode()
        self.offer = offer
        self.status = status
        self.counts = Counter[str]()
        """Requests by outcome."""
        self.open = set[OpenConnection]()
        self.refused = set[object]()
        """Clients beyond `max_clients` that are being refused."""
        self.max_clients = settings.max_clients
        self.max_refused = settings.max_clients
        self.buffered = BufferedBytes(settings.queue_bytes)
        self.stopping = False
        self.tls = ssl.create_default_context() if upstream.scheme == "https" else None

    def check_times(self) -> None:
        """End requests that clients do not finish in time."""
        now = time.monotonic()
        for connection in [*self.open]:
            connection.check_time(now)

    def is_loop(self, request: Request) -> bool:
        """Return whether this recorder forwarded the request already."""
        return any(self.identity in one for one in request.values(LOOP_HEADER.lower()))

    def forwarded_head(self, request: Request) -> bytes:
        """Return the head of a request for the server: the server's own host name, and this recorder's mark."""
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

"""A client beyond the limit of connections: it receives 503, and its bytes are not read."""

from __future__ import annotations

import asyncio
from typing import Any

from drafttrain.recorder.closing import LINGER_SECONDS
from drafttrain.recorder.own_answers import error_answer
from drafttrain.recorder.shared_state import SharedState


class RefusedClient(asyncio.Protocol):
    """Answers 503 and closes."""

    def __init__(self, shared: SharedState) -> None:
        self._shared = shared
        shared.counts["refused"] += 1
        shared.refused.add(self)

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        transport.write(error_answer(503, "the maximum number of clients is connected", "Retry-After: 1"))
        transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

    def eof_received(self) -> bool:
        """See asyncio."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self.leave()

    def leave(self) -> None:
        """Free the place of this client."""
        self._shared.refused.discard(self)

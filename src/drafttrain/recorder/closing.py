"""Two ways to close a connection: at once, or only after the client has received the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

LINGER_SECONDS = 2.0
"""A refused client may still be sending. Closing at once would reset the connection, and the client would lose the answer."""
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with a timeout of zero."""


def abort(transport: Any, *, reset: bool) -> None:
    """Close at once. A reset shows the other side that the data is incomplete."""
    if reset and (found := transport.get_extra_info("socket")) is not None:
        # Some event loops do not allow setting options on the socket of a transport.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    transport.abort()


def linger(transport: Any, *, client_has_ended: bool, slow_client_seconds: float) -> None:
    """Send the rest and the end, and keep reading for a moment, so that the client receives the answer.

    Args:
        client_has_ended: The client sends nothing more, so there is nothing to read.
        slow_client_seconds: Interval after which a client that has not received everything is checked again.
    """
    if transport.is_closing():
        return
    transport.resume_reading()
    if client_has_ended:
        transport.close()
        return
    transport.write_eof()
    asyncio.get_running_loop().call_later(LINGER_SECONDS, _after_lingering, transport, 0, slow_client_seconds)


def _after_lingering(transport: Any, bytes_left_before: int, slow_client_seconds: float) -> None:
    bytes_left = 0 if transport.is_closing() else transport.get_write_buffer_size()
    if bytes_left == bytes_left_before:
        # The client has received everything, or it does not read at all.
        transport.abort()
    else:
        loop = asyncio.get_running_loop()
        loop.call_later(slow_client_seconds, _after_lingering, transport, bytes_left, slow_client_seconds)

"""Accepts clients up to the limit, and some more that receive 503. All others wait in the queue of the operating system."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable

from drafttrain.recorder.client_connection import ClientConnection
from drafttrain.recorder.refused_client import RefusedClient
from drafttrain.recorder.shared_state import SharedState

BACKLOG = 4096
"""Clients that may wait to be accepted. The operating system may allow fewer."""
RESERVED_FILES = 256
"""Open files for records and the line worker; the same number again is reserved for clients that are being refused."""
PAUSE_SECONDS = 0.02


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on every address of a host, all on the same port.

    Raises:
        OSError: The recorder cannot listen on an address.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((one[0], one[4]) for one in found):
            same_port = sockets[0].getsockname()[1] if sockets else port
            bound = (address[0], same_port, *address[2:])
            sockets.append(socket.create_server(bound, family=family, backlog=BACKLOG))
            sockets[-1].setblocking(False)
    except OSError:
        for one in sockets:
            one.close()
        raise
    return sockets


def most_clients(wanted: int) -> tuple[int, int]:
    """Raise the soft limit of open files as far as needed. Return how many clients fit, and how many more can be refused at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 2 * RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return wanted, RESERVED_FILES
    reserved = min(RESERVED_FILES, soft // 4)
    return max(1, min(wanted, (soft - 2 * reserved) // 2)), reserved


async def accept(listening: socket.socket, shared: SharedState, say_once: Callable[[str], None]) -> None:
    """Accept clients until this task is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        if len(shared.refused) >= shared.max_refused:
            # Those being refused receive their answer first.
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        try:
            client, _ = await loop.sock_accept(listening)
        except ConnectionError:
            continue
        except OSError as error:
            # No file descriptor or memory is left. Clients stay in the queue.
            say_once(f"cannot accept more clients for now: {error.strerror}")
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        is_full = len(shared.open) >= shared.max_clients
        connection = RefusedClient(shared) if is_full else ClientConnection(shared)
        try:
            await loop.connect_accepted_socket(lambda made=connection: made, client)  # type: ignore[misc]
        except BaseException as error:
            connection.leave()
            client.close()
            if not isinstance(error, OSError):
                raise

"""Takes clients in, as many as may be served and some more that can be told that they may not; the others wait in the system's queue."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable

from drafttrain.recorder.client_side import ClientSide
from drafttrain.recorder.relay import RefusedSide, Relays

BACKLOG = 4096
"""Clients that may wait to be accepted; the system may allow fewer."""
FILES_ASIDE = 256
"""Open files that are no client's: records, the process that makes lines; and as many for clients that are being refused."""
PAUSE_SECONDS = 0.02


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen on every address of a host, all on one port.

    Raises:
        OSError: One cannot be listened on.
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
    """Raise the soft limit of open files as far as clients need, and return how many fit, and how many more can be told so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 2 * FILES_ASIDE
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return wanted, FILES_ASIDE
    aside = min(FILES_ASIDE, soft // 4)
    return max(1, min(wanted, (soft - 2 * aside) // 2)), aside


async def accept(listening: socket.socket, relays: Relays, say_once: Callable[[str], None]) -> None:
    """Take clients in until this is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        if len(relays.refused) >= relays.most_refused:
            # Each of them gets its answer; who waits longer hears the same.
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        try:
            client, _ = await loop.sock_accept(listening)
        except ConnectionError:
            continue
        except OSError as error:
            # No more open files, or no memory: nobody is lost, they wait.
            say_once(f"clients have to wait: {error.strerror}")
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        is_full = len(relays.open) >= relays.most_clients
        side = RefusedSide(relays) if is_full else ClientSide(relays)
        try:
            await loop.connect_accepted_socket(lambda made=side: made, client)  # type: ignore[misc]
        except BaseException as error:
            relays.left(side)
            client.close()
            if not isinstance(error, OSError):
                raise

"""Idle connections to rank 0: the operating system closes one as soon as a process at its end dies.

A missing heartbeat may come from a process that is busy; a closed connection cannot.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from typing import Any

CONNECT_SECONDS = 10.0
KEY = "lifelines"


class Lifelines:
    """The ends of the connections that this process holds: rank 0 holds one for every other process.

    Args:
        store: Where rank 0 publishes the address on which it listens.
        host: The host of the store, which all processes can reach.

    Raises:
        OSError: Rank 0 cannot be reached there.
    """

    def __init__(self, store: Any, *, rank: int, host: str) -> None:
        self._password = ""
        self._listener: socket.socket | None = None
        self._ends: dict[int, socket.socket] = {}
        if rank == 0:
            self._password = uuid.uuid4().hex
            self._listener = _listening()
            store.set(KEY, f"{_own_address(host)} {self._listener.getsockname()[1]} {self._password}")
            return
        address, port, password = store.get(KEY).decode().split()
        end = socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)
        end.sendall(f"{password} {rank}\n".encode())
        end.setblocking(False)
        self._ends[0] = end

    def cut(self) -> list[int]:
        """Return the ranks whose connections were closed since the last call."""
        self._accept()
        gone = [rank for rank, end in self._ends.items() if _is_cut(end)]
        for rank in gone:
            self._ends.pop(rank).close()
        return gone

    def close(self) -> None:
        """Close all connections."""
        for end in [*self._ends.values(), *filter(None, [self._listener])]:
            end.close()
        self._ends.clear()
        self._listener = None

    def _accept(self) -> None:
        """Accept the connections that were opened since the last call."""
        while self._listener is not None:
            try:
                end, _ = self._listener.accept()
            except BlockingIOError:
                return
            end.settimeout(1.0)
            with contextlib.suppress(OSError, ValueError):
                password, rank = end.makefile("r").readline(100).split()
                if password == self._password:
                    end.setblocking(False)
                    self._ends[int(rank)] = end
                    continue
            end.close()  # A stranger who found the port.


def _listening() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def _own_address(host: str) -> str:
    """Return the address under which the others reach this machine: its own address towards the store's host."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as towards:
            towards.connect(place)
            own = str(towards.getsockname()[0])
    except OSError:
        return host
    # A loopback address means that this machine is the store's host itself, whose name the others know.
    return host if own.startswith("127.") or own == "::1" else own


def _is_cut(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True

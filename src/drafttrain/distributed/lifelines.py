"""Connections over which nothing is said: the system ends one when a process at its end dies, so a death is seen at once.

A pulse that falls silent may be that of a process that is busy. These lines go from every process to the first one.
"""

from __future__ import annotations

import contextlib
import socket
import uuid
from typing import Any

CONNECT_SECONDS = 10.0
KEY = "lifelines"


class Lifelines:
    """The ends that this process holds.

    Args:
        store: Where the first process says which address it listens on.
        host: The address of the store, which all processes reach.

    Raises:
        OSError: The first process cannot be reached there.
    """

    def __init__(self, store: Any, *, rank: int, host: str) -> None:
        self._word = ""
        self._door: socket.socket | None = None
        self._ends: dict[int, socket.socket] = {}
        if rank == 0:
            self._word = uuid.uuid4().hex
            self._door = _listening()
            store.set(KEY, f"{_own_address(host)} {self._door.getsockname()[1]} {self._word}")
            return
        address, port, word = store.get(KEY).decode().split()
        end = socket.create_connection((address, int(port)), timeout=CONNECT_SECONDS)
        end.sendall(f"{word} {rank}\n".encode())
        end.setblocking(False)
        self._ends[0] = end

    def cut(self) -> list[int]:
        """Return the processes at whose ends a line was cut since the last call."""
        self._let_in()
        gone = [rank for rank, end in self._ends.items() if _is_cut(end)]
        for rank in gone:
            self._ends.pop(rank).close()
        return gone

    def close(self) -> None:
        """Close all."""
        for end in [*self._ends.values(), *filter(None, [self._door])]:
            end.close()
        self._ends.clear()
        self._door = None

    def _let_in(self) -> None:
        """Take up the lines of processes that came since the last call."""
        while self._door is not None:
            try:
                end, _ = self._door.accept()
            except BlockingIOError:
                return
            end.settimeout(1.0)
            with contextlib.suppress(OSError, ValueError):
                word, rank = end.makefile("r").readline(100).split()
                if word == self._word:
                    end.setblocking(False)
                    self._ends[int(rank)] = end
                    continue
            end.close()  # Somebody else who found the port.


def _listening() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    door = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
    door.setblocking(False)
    return door


def _own_address(host: str) -> str:
    """Return the address by which the others reach this machine: the one that it has towards the host that they all know."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as towards:
            towards.connect(place)
            own = str(towards.getsockname()[0])
    except OSError:
        return host
    # This machine is that host itself, and the others know its name.
    return host if own.startswith("127.") or own == "::1" else own


def _is_cut(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True

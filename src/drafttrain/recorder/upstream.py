"""The address of the server behind the recorder, with and without its credentials."""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes, urlsplit

from drafttrain.core.errors import RecipeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
EXAMPLE = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Upstream:
    """A parsed address."""

    scheme: str
    host: str
    port: int
    path: str
    """Prefix of the path of each request."""
    authorization: bytes | None
    """Authorization header from the name and password in the address, for requests without one."""

    @staticmethod
    def of(address: str) -> Upstream:
        """Parse an address.

        Raises:
            RecipeError: The address is not valid.
        """
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\x00-\x20\x7f]", address):
            raise _wrong(f"must be an address such as {EXAMPLE}", address)
        if parts.query or parts.fragment:
            raise _wrong(f"must be an address without '?' and '#', such as {EXAMPLE}", address)
        named, _, password = parts.netloc.rpartition("@")[0].partition(":")
        credentials = unquote_to_bytes(named) + b":" + unquote_to_bytes(password)
        authorization = b"Basic " + base64.b64encode(credentials) if "@" in parts.netloc else None
        usual = 443 if parts.scheme == "https" else 80
        return Upstream(parts.scheme, parts.hostname, port or usual, parts.path.rstrip("/"), authorization)

    @property
    def authority(self) -> str:
        """Host and port as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    @property
    def shown(self) -> str:
        """The address without name and password."""
        return f"{self.scheme}://{self.authority}{self.path}"

    def is_one_of(self, listening: Iterable[socket.socket]) -> bool:
        """Return whether a connection to the address would reach one of these sockets. Blocks while the name is resolved."""
        own = [one.getsockname()[:2] for one in listening]
        if self.port not in {port for _, port in own}:
            return False
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        addresses = {_destination(one[4][0]) for one in found}
        for host, port in own:
            mine = _plain(host)
            if port == self.port and any(
                mine == address or (mine.is_unspecified and mine.version == address.version and _is_local(address))
                for address in addresses
            ):
                return True
        return False


def _plain(address: str | int) -> Address:
    """Return an address without its zone. A mapped address is returned as IPv4."""
    found = ipaddress.ip_address(str(address).partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


def _destination(address: str | int) -> Address:
    """Return the address that a connection reaches: the unspecified address means this machine."""
    found = _plain(address)
    return _plain("127.0.0.1" if found.version == 4 else "::1") if found.is_unspecified else found


def _is_local(address: Address) -> bool:
    """Return whether an address belongs to this machine: only such an address can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one:
            one.bind((str(address), 0))
    except OSError:
        return False
    return True


def _wrong(must: str, address: str) -> RecipeError:
    # The part before an @ or after a ? may be a password, and this message goes into logs.
    hidden = re.sub(r"[?#].*", "?...", re.sub(r"(^|//).*@", r"\1...@", address, flags=re.S), flags=re.S)
    return RecipeError("arguments", [f"--upstream: {must}, got {hidden!r}"])

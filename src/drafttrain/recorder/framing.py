"""Where a message of HTTP/1 begins and ends in the bytes that pass.

Requests come from anybody: one that two readers could cut in different places is refused. Answers come from the server that was
named: what cannot be followed passes on unread.

Source: Fielding, Nottingham and Reschke 2022, "HTTP/1.1", RFC 9112, sections 2 to 7.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol
from urllib.parse import unquote_to_bytes

LONGEST_HEAD = 256 * 2**10
"""Bytes of a request line or status line with its headers; trailers may be as long."""
LONGEST_CHUNK_LINE = 4096
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*([^\x00\r\n]*)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: [^\r\n]*)?")
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
FRAMING_FIELDS = (b"content-length", b"transfer-encoding", b"host")
"""Fields that must not come behind a body: a reader that adds trailers to the headers would cut differently."""


class Malformed(ValueError):
    """A request that cannot be cut in one way only; `status` is what its client is told."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Body(Protocol):
    """Follows one body."""

    done: bool

    def feed(self, data: bytes, position: int, content: list[bytes]) -> int:
        """Return where in `data` the body ends, or the end of `data`, and add what it holds, without framing, to `content`."""


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a message, and the bytes that they came in."""

    raw: bytes
    line: tuple[bytes, ...]
    """Method, target and minor version of a request; minor version and status of an answer."""
    headers: tuple[tuple[bytes, bytes], ...]
    """Names in small letters."""

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a header, in their order."""
        return [value for one, value in self.headers if one == name]

    def value(self, name: bytes) -> bytes:
        """Return the values of a header as one, in small letters."""
        return b",".join(self.values(name)).strip().lower()

    def rewritten(
        self,
        *,
        line: bytes | None = None,
        replaced: Mapping[bytes, bytes] = MappingProxyType({}),
        dropped: Collection[bytes] = (),
        added: Sequence[bytes] = (),
    ) -> bytes:
        """Return the bytes of the head with some headers changed; all others keep theirs."""
        first, *fields = self.raw.strip(b"\r\n").split(b"\n")
        named = [(one.partition(b":")[0].strip().lower(), one.rstrip(b"\r")) for one in fields]
        kept = [replaced.get(name, one) for name, one in named if name not in dropped]
        return b"\r\n".join([line or first.rstrip(b"\r"), *kept, *added, b"", b""])


class Request(Head):
    """The head of a request."""

    @property
    def method(self) -> bytes:
        """GET, POST."""
        return self.line[0]

    @property
    def target(self) -> bytes:
        """What stands between method and version."""
        return self.line[1]

    @property
    def minor(self) -> bytes:
        """0 or 1."""
        return self.line[2]

    @property
    def path(self) -> str:
        """The path, also of a target in absolute form, without its query and without percent-encoding."""
        path = self.target.partition(b"?")[0]
        if not path.startswith(b"/"):
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
        return unquote_to_bytes(path).decode("utf-8", "replace")

    @property
    def leaves_http(self) -> bool:
        """Whether the answer decides what the bytes behind the request are."""
        return self.method == b"CONNECT" or bool(self.values(b"upgrade"))

    def body(self) -> Body:
        """Return what follows the body.

        Raises:
            Malformed: Its length can be read in several ways.
        """
        codings, lengths = self.values(b"transfer-encoding"), self.values(b"content-length")
        if codings:
            *others, last = [one.strip(b" \t").lower() for one in b",".join(codings).split(b",")]
            if lengths:
                raise Malformed("Transfer-Encoding and Content-Length in one request")
            if self.minor == b"0":
                raise Malformed("Transfer-Encoding in a request of HTTP/1.0")
            if last != b"chunked" or not all(re.fullmatch(TOKEN, one) and one != b"chunked" for one in others):
                raise Malformed("Transfer-Encoding must end with chunked, once")
            return Chunked(strict=True)
        if lengths:
            values = {one.strip(b" \t") for one in b",".join(lengths).split(b",")}
            if len(values) != 1 or not re.fullmatch(rb"[0-9]{1,18}", next(iter(values))):
                raise Malformed("Content-Length must be one number")
            return Sized(int(next(iter(values))))
        return Sized(0)


class Answer(Head):
    """The head of an answer."""

    @property
    def status(self) -> int:
        """200, 404."""
        return int(self.line[1])

    def body(self, request: Request) -> Body:
        """Return what follows the body; ambiguous ones as most clients read them."""
        tunnel = request.method == b"CONNECT" and self.status // 100 == 2
        if tunnel or request.method == b"HEAD" or self.status // 100 == 1 or self.status in (204, 304):
            return Sized(0)
        if self.value(b"transfer-encoding").endswith(b"chunked"):
            return Chunked(strict=False)
        length = self.value(b"content-length").partition(b",")[0].strip()
        return Sized(int(length)) if re.fullmatch(rb"[0-9]{1,18}", length) else UntilClosed()


class Sized:
    """A body of so many bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.done = size == 0

    def feed(self, data: bytes, position: int, content: list[bytes]) -> int:
        """See `Body`."""
        piece = data[position : position + self._left]
        content.append(piece)
        self._left -= len(piece)
        self.done = self._left == 0
        return position + len(piece)


class UntilClosed:
    """A body that ends with the connection."""

    done = False

    def feed(self, data: bytes, position: int, content: list[bytes]) -> int:
        """See `Body`."""
        content.append(data[position:])
        return len(data)


class Chunked:
    """A body in chunks, and the trailers behind it.

    Args:
        strict: Refuse what some readers understand differently; else what cannot be read at all.
    """

    def __init__(self, *, strict: bool) -> None:
        self.done = False
        self._strict = strict
        self._left = 0
        self._line = b""
        self._awaits = "size"
        self._trailers = 0

    def feed(self, data: bytes, position: int, content: list[bytes]) -> int:
        """See `Body`.

        Raises:
            Malformed: These are no chunks.
        """
        while position < len(data) and not self.done:
            if self._awaits == "data":
                piece = data[position : position + self._left]
                content.append(piece)
                self._left -= len(piece)
                position += len(piece)
                if not self._left:
                    self._awaits = "gap"
                continue
            end = data.find(b"\n", position) + 1 or len(data)
            self._line += data[position:end]
            position = end
            if self._line.endswith(b"\n"):
                line, self._line = self._line, b""
                self._take(line)
            elif len(self._line) > (LONGEST_HEAD if self._awaits == "trailer" else LONGEST_CHUNK_LINE):
                raise Malformed("a line of a chunk is too long")
            elif self._awaits == "gap" and self._line != b"\r":
                raise Malformed("a chunk is longer than its size")
        return position

    def _take(self, line: bytes) -> None:
        if self._strict and not line.endswith(b"\r\n"):
            raise Malformed("a line of a chunk must end with CR LF")
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
        if self._awaits == "gap":
            if line:
                raise Malformed("a chunk is longer than its size")
            self._awaits = "size"
        elif self._awaits == "size":
            found = CHUNK_LINE.fullmatch(line if self._strict else line.partition(b";")[0].strip())
            if not found:
                raise Malformed("the size of a chunk must be hexadecimal")
            self._left = int(found[1], 16)
            self._awaits = "data" if self._left else "trailer"
        elif line:
            self._trailers += len(line)
            field = FIELD.fullmatch(line)
            if self._strict and (not field or field[1].lower() in FRAMING_FIELDS or self._trailers > LONGEST_HEAD):
                raise Malformed("a trailer is none that may stand behind a body")
        else:
            self.done = True


def request_head(data: bytes) -> Request | None:
    """Return the head that bytes begin with; None: it is not whole yet.

    Raises:
        Malformed: It is no request of HTTP/1, or its lines can be cut in several ways.
    """
    # Some clients send an empty line behind a body.
    start = len(data) - len(data.lstrip(b"\r\n")) if data[:1] in (b"\r", b"\n") else 0
    if data[:start] not in (b"", b"\r\n", b"\r"):
        raise Malformed("empty lines stand where a request should")
    end = data.find(b"\r\n\r\n", start)
    if end < 0:
        if len(data) > LONGEST_HEAD:
            raise Malformed(f"the head of a request is longer than {LONGEST_HEAD} bytes", 431)
        line, newline, _ = data[start:].partition(b"\n")
        if newline and not REQUEST_LINE.fullmatch(line[:-1]):
            raise Malformed("no request line of HTTP/1.0 or HTTP/1.1")
        return None
    first, *lines = data[start:end].split(b"\r\n")
    found = REQUEST_LINE.fullmatch(first)
    if not found:
        raise Malformed("no request line of HTTP/1.0 or HTTP/1.1")
    fields = [FIELD.fullmatch(line) for line in lines]
    headers = tuple((field[1].lower(), field[2].strip(b" \t")) for field in fields if field)
    if len(headers) != len(lines):
        raise Malformed("a header must be a name, a colon and a value on one line")
    return Request(data[: end + 4], found.groups(), headers)


def answer_head(data: bytes, position: int) -> Answer | None:
    """Return the head that stands at a position; None: it is not whole yet.

    Raises:
        Malformed: It is none of HTTP/1.
    """
    end = END_OF_HEAD.search(data, position)
    if not end:
        if len(data) - position > LONGEST_HEAD or b"HTTP/"[: len(data) - position] != data[position : position + 5]:
            raise Malformed("no head of an answer")
        return None
    first, *lines = data[position : end.start()].split(b"\n")
    found = STATUS_LINE.fullmatch(first.rstrip(b"\r"))
    if not found:
        raise Malformed("no status line of HTTP/1")
    parts = [line.partition(b":") for line in lines]
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in parts)
    return Answer(data[position : end.end()], found.groups(), headers)

"""Finds where HTTP/1 messages begin and end.

Requests are untrusted: one that two parsers could split in different places is refused. Answers come from the configured server: one
that cannot be parsed is passed on and not recorded.

Source: Fielding, Nottingham and Reschke 2022, "HTTP/1.1", RFC 9112, sections 2 to 7.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol
from urllib.parse import unquote_to_bytes

MAX_HEAD_BYTES = 256 * 2**10
"""Maximum bytes of a head (first line and headers), and of the trailers."""
MAX_CHUNK_LINE_BYTES = 4096
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*([^\x00\r\n]*)")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: [^\r\n]*)?")
END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
FRAMING_FIELDS = (b"content-length", b"transfer-encoding", b"host")
"""Fields that must not be trailers: a parser that merges trailers into the headers would split the message differently."""


class Malformed(ValueError):
    """A request that could be parsed in more than one way. The client receives `status`."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Body(Protocol):
    """Follows one body."""

    done: bool

    def feed(self, data: bytes, position: int, content: list[bytes]) -> int:
        """Return where the body ends in `data`, or the end of `data`. Append the content, without framing, to `content`."""


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a message, and their raw bytes."""

    raw: bytes
    line: tuple[bytes, ...]
    """A request: method, target and minor version. An answer: minor version and status."""
    headers: tuple[tuple[bytes, bytes], ...]
    """Names are in lower case."""

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a header, in order."""
        return [value for one, value in self.headers if one == name]

    def value(self, name: bytes) -> bytes:
        """Return the values of a header, joined and in lower case."""
        return b",".join(self.values(name)).strip().lower()

    def rewritten(
        self,
        *,
        line: bytes | None = None,
        replaced: Mapping[bytes, bytes] = MappingProxyType({}),
        dropped: Collection[bytes] = (),
        added: Sequence[bytes] = (),
    ) -> bytes:
        """Return the head with some headers changed. All others keep their bytes."""
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
        """The request target, such as /v1/models."""
        return self.line[1]

    @property
    def minor(self) -> bytes:
        """0 or 1."""
        return self.line[2]

    @property
    def path(self) -> str:
        """The decoded path without the query, also if the target is in absolute form."""
        path = self.target.partition(b"?")[0]
        if not path.startswith(b"/"):
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
        return unquote_to_bytes(path).decode("utf-8", "replace")

    @property
    def leaves_http(self) -> bool:
        """Whether the answer decides what the bytes after the request are."""
        return self.method == b"CONNECT" or bool(self.values(b"upgrade"))

    def body(self) -> Body:
        """Return a parser of the body.

        Raises:
            Malformed: Its length is ambiguous.
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
        """Return a parser of the body. An ambiguous length is read as most clients read it."""
        tunnel = request.method == b"CONNECT" and self.status // 100 == 2
        if tunnel or request.method == b"HEAD" or self.status // 100 == 1 or self.status in (204, 304):
            return Sized(0)
        if self.value(b"transfer-encoding").endswith(b"chunked"):
            return Chunked(strict=False)
        length = self.value(b"content-length").partition(b",")[0].strip()
        return Sized(int(length)) if re.fullmatch(rb"[0-9]{1,18}", length) else UntilClosed()


class Sized:
    """A body of known length."""

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
    """A body in chunks, and its trailers.

    Args:
        strict: Refuse everything that parsers read in different ways; otherwise only input that cannot be parsed.
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
            Malformed: The chunks are invalid.
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
            elif len(self._line) > (MAX_HEAD_BYTES if self._awaits == "trailer" else MAX_CHUNK_LINE_BYTES):
                raise Malformed("a chunk line is too long")
            elif self._awaits == "gap" and self._line != b"\r":
                raise Malformed("a chunk is longer than its size")
        return position

    def _take(self, line: bytes) -> None:
        if self._strict and not line.endswith(b"\r\n"):
            raise Malformed("a chunk line must end with CR LF")
        line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
        if self._awaits == "gap":
            if line:
                raise Malformed("a chunk is longer than its size")
            self._awaits = "size"
        elif self._awaits == "size":
            found = CHUNK_LINE.fullmatch(line if self._strict else line.partition(b";")[0].strip())
            if not found:
                raise Malformed("the chunk size must be hexadecimal")
            self._left = int(found[1], 16)
            self._awaits = "data" if self._left else "trailer"
        elif line:
            self._trailers += len(line)
            field = FIELD.fullmatch(line)
            if self._strict and (not field or field[1].lower() in FRAMING_FIELDS or self._trailers > MAX_HEAD_BYTES):
                raise Malformed("invalid trailer")
        else:
            self.done = True


def request_head(data: bytes) -> Request | None:
    """Return the head at the beginning of the data; None: it is incomplete.

    Raises:
        Malformed: It is not an HTTP/1 request, or its lines are ambiguous.
    """
    # Some clients send an empty line after a body.
    start = len(data) - len(data.lstrip(b"\r\n")) if data[:1] in (b"\r", b"\n") else 0
    if data[:start] not in (b"", b"\r\n", b"\r"):
        raise Malformed("empty lines before the request")
    end = data.find(b"\r\n\r\n", start)
    if end < 0:
        if len(data) > MAX_HEAD_BYTES:
            raise Malformed(f"the request head is longer than {MAX_HEAD_BYTES} bytes", 431)
        line, newline, _ = data[start:].partition(b"\n")
        if newline and not REQUEST_LINE.fullmatch(line[:-1]):
            raise Malformed("the first line is not a request line of HTTP/1.0 or HTTP/1.1")
        return None
    first, *lines = data[start:end].split(b"\r\n")
    found = REQUEST_LINE.fullmatch(first)
    if not found:
        raise Malformed("the first line is not a request line of HTTP/1.0 or HTTP/1.1")
    fields = [FIELD.fullmatch(line) for line in lines]
    headers = tuple((field[1].lower(), field[2].strip(b" \t")) for field in fields if field)
    if len(headers) != len(lines):
        raise Malformed("a header must be a name, a colon and a value on one line")
    return Request(data[: end + 4], found.groups(), headers)


def answer_head(data: bytes, position: int) -> Answer | None:
    """Return the head at a position; None: it is incomplete.

    Raises:
        Malformed: It is not an HTTP/1 head.
    """
    end = END_OF_HEAD.search(data, position)
    if not end:
        if len(data) - position > MAX_HEAD_BYTES or b"HTTP/"[: len(data) - position] != data[position : position + 5]:
            raise Malformed("not the head of an answer")
        return None
    first, *lines = data[position : end.start()].split(b"\n")
    found = STATUS_LINE.fullmatch(first.rstrip(b"\r"))
    if not found:
        raise Malformed("not an HTTP/1 status line")
    parts = [line.partition(b":") for line in lines]
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in parts)
    return Answer(data[position : end.end()], found.groups(), headers)

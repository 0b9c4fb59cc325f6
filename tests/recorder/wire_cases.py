"""Raw requests and answers: those that the recorder must relay unchanged, and ambiguous ones that it must refuse."""

from __future__ import annotations

import gzip
import itertools
import zlib
from dataclasses import dataclass

HOST = b"Host: server.example\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
JSON = b'{"model":"m","prompt":"Once"}'
ANSWER = b'{"choices":[{"text":" upon","finish_reason":"stop"}]}'
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


@dataclass(frozen=True)
class Exchange:
    """A request of a client and the answer of the server."""

    request: tuple[bytes, ...]
    """Pieces that are sent one by one."""
    answer: bytes = OK
    after: int | None = None
    """Bytes after the head that the server waits for; None: all."""
    end: str = ""
    """How the server ends the connection: not at all, `close` or `reset`."""


@dataclass(frozen=True)
class Case:
    """Exchanges on one connection."""

    name: str
    exchanges: tuple[Exchange, ...]
    at_once: bool = False
    """All requests are sent before the first answer is read."""


def request(
    line: bytes = b"GET /v1/models HTTP/1.1", headers: bytes = b"", body: bytes = b"", *, host: bytes = HOST
) -> bytes:
    return line + b"\r\n" + host + headers + b"\r\n" + body


def sized(body: bytes, headers: bytes = b"", line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return request(line, b"Content-Length: %d\r\n" % len(body) + headers, body)


def chunks(*bodies: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in bodies) + end


def chunked(body: bytes, headers: bytes = b"", line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return request(line, b"Transfer-Encoding: chunked\r\n" + headers, body)


def answer(status: bytes = b"200 OK", headers: bytes = b"", body: bytes = b"", *, version: bytes = b"1.1") -> bytes:
    return b"HTTP/" + version + b" " + status + b"\r\n" + headers + b"\r\n" + body


def answer_sized(body: bytes = ANSWER, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return answer(status, b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body) + headers, body)


def one(name: str, sent: bytes | tuple[bytes, ...], answered: bytes = OK, **more: object) -> Case:
    pieces = sent if isinstance(sent, tuple) else (sent,)
    return Case(name, (Exchange(pieces, answered, **more),))  # type: ignore[arg-type]


METHODS = [
    one(f"method {method}", request(f"{method} /v1/x HTTP/1.1".encode()))
    for method in ("GET", "DELETE", "OPTIONS", "PATCH", "PUT", "TRACE", "PURGE", "get", "M-SEARCH")
]

TARGETS = [
    one(f"target {target!r}"[:60], request(b"GET " + target + b" HTTP/1.1"))
    for target in (
        b"/", b"/v1/models?a=%20b&a=+c&&=", b"/v1/models?", b"/a%2Fb%2fc%00", b"//double//slash", b"/a/./../b", b"/a;b=c,d",
        b"/%7Euser/~user", b"/caf\xc3\xa9", b"/q?url=http://x/y?z", b"/[x]{y}|z", b"/#fragment", b"/" + b"x" * 30_000, b"*",
        b"http://server.example/v1/models?x=%2f", b"https://server.example", b"http://user:word@other.example:81/v1",
    )
]  # fmt: skip

HEADERS = [
    one(f"header {name}", request(headers=headers))
    for name, headers in {
        "twice": b"X-A: 1\r\nX-B: 2\r\nX-A: 3\r\n",
        "in its own spelling": b"x-LoWeR: A\r\nX-UPPER: b\r\n",
        "empty": b"X-Empty:\r\nX-Blank: \r\n",
        "with blanks around": b"X-Wide:  \t a  b \t \r\n",
        "with a tab inside": b"X-Tab: a\tb\r\n",
        "of Latin-1": b"X-Name: \xe9\xff\r\n",
        "of 60 kB": b"X-Long: " + b"y" * 60_000 + b"\r\n",
        "300 times": b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(300)),
        "named with signs": b"X!#$%&'*+.^_`|~: 1\r\n",
        "Content_Length": b"Content_Length: 5\r\n",
        "of one connection": b"Connection: keep-alive, X-Own\r\nKeep-Alive: timeout=5\r\nX-Own: 1\r\nTE: trailers\r\n",
        "Proxy-Connection": b"Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eDp5\r\n",
        "Cookie twice": b"Cookie: a=1\r\nCookie: b=2\r\n",
        "Accept-Encoding": b"Accept-Encoding: zstd, br;q=0.9, gzip\r\n",
        "Accept-Encoding, empty": b"Accept-Encoding:\r\n",
        "Authorization": b"Authorization: Bearer abc\r\n",
        "X-Forwarded-For": b"X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1\r\nVia: 1.1 other\r\n",
        "Range": b"Range: bytes=0-10\r\nIf-None-Match: \"x\"\r\n",
        "Upgrade that is refused": UPGRADE,
        "h2c that is refused": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    }.items()
]  # fmt: skip
HEADERS += [
    one("no host, HTTP/1.0", request(b"GET / HTTP/1.0", host=b""), end="close"),
    one("keep-alive, HTTP/1.0", request(b"GET / HTTP/1.0", b"Connection: keep-alive\r\n")),
    one("an empty line first", b"\r\n" + request()),
]

BODIES = [
    one("a recorded body", sized(JSON), answer_sized()),
    one("a recorded body in absolute form", sized(JSON, line=b"POST http://server.example/v1/completions HTTP/1.1")),
    one("an empty body", sized(b"")),
    one("a GET with a body", sized(b"body", line=b"GET /x HTTP/1.1")),
    one("a DELETE with a body", chunked(chunks(b"body"), line=b"DELETE /x HTTP/1.1")),
    one("the same length twice", request(b"POST /x HTTP/1.1", b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ab")),
    one("bytes of any kind", sized(bytes(range(256)) * 4, line=b"POST /upload HTTP/1.1")),
    one("300 kB", sized(b"z" * 300_000)),
    one("300 kB in chunks", chunked(chunks(*[b"z" * 5_000] * 60))),
    one("one chunk", chunked(chunks(JSON)), answer_sized()),
    one("chunks with extensions", chunked(b'4;a=b;c="d e"\r\n{"a"\r\n3;x\r\n:1}\r\n0;last\r\n\r\n')),
    one("chunks of upper-case size", chunked(b"00A\r\n0123456789\r\nA\r\n0123456789\r\n000\r\n\r\n")),
    one("trailers", chunked(chunks(JSON, end=b"0\r\nX-Sum: 1\r\nx-more:2\r\n\r\n"), b"Trailer: X-Sum\r\n")),
    one("chunks, spelled differently", request(b"POST /x HTTP/1.1", b"tRANSFER-eNCODING:  CHUNKED \r\n", chunks(b"ab"))),
    one("chunks that are also compressed on the way", request(b"POST /x HTTP/1.1", b"TE: gzip\r\nTransfer-Encoding: gzip, chunked\r\n",
        chunks(gzip.compress(b"ab")))),
    one("piece by piece", tuple(sized(JSON)[n : n + 7] for n in range(0, len(sized(JSON)), 7)), answer_sized()),
    one("chunks piece by piece", tuple(chunked(chunks(JSON))[n : n + 3] for n in range(0, len(chunked(chunks(JSON))), 3))),
    one("no JSON", sized(b"\xff{")),
    one("Expect", (request(b"POST /v1/completions HTTP/1.1", b"Expect: 100-continue\r\nContent-Length: 29\r\n"), JSON),
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK, after=0),
    one("Expect that is refused", request(b"POST /v1/completions HTTP/1.1", b"Expect: 100-continue\r\nContent-Length: 29\r\n"),
        answer(b"417 Expectation Failed", b"Content-Length: 0\r\n"), after=0, end="close"),
    one("an answer before the body is whole", (request(b"POST /x HTTP/1.1", b"Content-Length: 9000000\r\n"), b"some"),
        answer(b"413 Content Too Large", b"Content-Length: 3\r\nConnection: close\r\n", b"big"), after=0, end="close"),
]  # fmt: skip
for coding, packed in {
    "gzip": gzip.compress(JSON, mtime=0),
    "deflate": zlib.compress(JSON),
    "br": b"\x0b\x0e\x80" + JSON + b"\x03",
    "zstd": b"\x28\xb5\x2f\xfd\x20\x1d\xe9\x00\x00" + JSON,
    "gzip, gzip": gzip.compress(gzip.compress(JSON, mtime=0), mtime=0),
    "unknown": JSON,
}.items():
    encoding = b"Content-Encoding: " + coding.encode() + b"\r\n"
    BODIES += [
        one(f"{coding}, recorded", sized(packed, encoding), answer_sized(packed, encoding)),
        one(f"{coding}, other path", sized(packed, encoding, b"POST /v1/embeddings HTTP/1.1")),
        one(f"{coding}, chunks", chunked(chunks(packed[:9], packed[9:]), encoding)),
    ]

STREAM = b"".join(b"data: %d\n\n" % number for number in range(5)) + b"data: [DONE]\n\n"
EVENTS = b"Content-Type: text/event-stream\r\n"
ANSWERS = [
    one(f"status {status!r}", sized(JSON), answer(status, b"Content-Length: 3\r\nX: 1\r\n", b"why"))
    for status in (b"200 OK", b"201 Created", b"400 Bad Request", b"401 ", b"404 Not Found", b"418 I'm a teapot", b"422", b"429 Wait!",
                   b"500 Internal Server Error", b"503 N\xe9", b"599 Own")
]  # fmt: skip
ANSWERS += [
    one(f"redirect {status}", sized(JSON), answer(b"%d Go" % status, b"Location: http://nowhere.example/?a=%2f\r\nContent-Length: 0\r\n"))
    for status in (301, 302, 303, 307, 308)
]  # fmt: skip
ANSWERS += [
    one("204", request(), answer(b"204 No Content", b"X: 1\r\n")),
    one("304 with a length", request(), answer(b"304 Not Modified", b"Content-Length: 100\r\nETag: \"x\"\r\n")),
    one("HEAD with a length", request(b"HEAD /x HTTP/1.1"), answer(headers=b"Content-Length: 100\r\n")),
    one("HEAD of chunks", request(b"HEAD /x HTTP/1.1"), answer(headers=b"Transfer-Encoding: chunked\r\n")),
    one("no body", request(), answer(headers=b"Content-Length: 0\r\n")),
    one("answer in chunks", sized(JSON), answer(headers=b"Transfer-Encoding: chunked\r\n", body=chunks(ANSWER[:9], ANSWER[9:]))),
    one("answer with extensions", request(), answer(headers=b"Transfer-Encoding: chunked\r\n", body=b"2;a=b\r\nok\r\n0\r\n\r\n")),
    one("answer with trailers", request(), answer(headers=b"Transfer-Encoding: chunked\r\nTrailer: X\r\n",
        body=chunks(b"ok", end=b"0\r\nX: 1\r\nY: 2\r\n\r\n"))),
    one("answer of both lengths", request(), answer(headers=b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", body=chunks(b"ok"))),
    one("answer until the end", request(), answer(headers=b"Connection: close\r\n", body=b"until the end"), end="close"),
    one("answer of HTTP/1.0", request(b"GET / HTTP/1.0"), answer(body=b"old", version=b"1.0"), end="close"),
    one("answer of HTTP/1.0 to HTTP/1.1", request(), answer(body=b"old", version=b"1.0"), end="close"),
    one("answer and close", request(), answer(headers=b"Connection: close\r\nContent-Length: 2\r\n", body=b"ok"), end="close"),
    one("Set-Cookie twice", request(), answer(headers=b"Set-Cookie: a=1; Path=/\r\nSet-Cookie: b=2, c\r\nContent-Length: 0\r\n")),
    one("answer's header of 60 kB", request(), answer(headers=b"X: " + b"y" * 60_000 + b"\r\nContent-Length: 0\r\n")),
    one("answer's header spelled differently", request(), b"HTTP/1.1 200 OK\r\ncontent-LENGTH:2\r\nX:  a \r\nDate: x\r\n\r\nok"),
    one("answer's lines end with LF", request(), b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
    one("answer that folds a header", request(), b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok"),
    one("answer of 1 MB", request(), answer(headers=b"Content-Length: 1000000\r\n", body=b"m" * 1_000_000)),
    one("early hints", request(), b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK),
    one("two early answers", request(), b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK),
    one("events in chunks", sized(JSON), answer(headers=EVENTS + b"Transfer-Encoding: chunked\r\n", body=chunks(STREAM))),
    one("events until the end", sized(JSON), answer(headers=EVENTS + b"Connection: close\r\n", body=STREAM), end="close"),
    one("events of HTTP/1.0", sized(JSON, line=b"POST /v1/completions HTTP/1.0"), answer(headers=EVENTS, body=STREAM, version=b"1.0"),
        end="close"),
    one("not HTTP", request(), b"SSH-2.0-x\r\n", end="close"),
    one("no answer", request(), b"", end="close"),
    one("half a head", request(), b"HTTP/1.1 200 OK\r\nX: ", end="close"),
    one("less than its length", sized(JSON), answer(headers=b"Content-Length: 100\r\n", body=b"less"), end="close"),
    one("truncated chunks", sized(JSON), answer(headers=b"Transfer-Encoding: chunked\r\n", body=b"5\r\nab"), end="close"),
    one("chunks without an end", sized(JSON), answer(headers=b"Transfer-Encoding: chunked\r\n", body=b"2\r\nab\r\n"), end="close"),
    one("invalid chunks", sized(JSON), answer(headers=b"Transfer-Encoding: chunked\r\n", body=b"xyz\r\nab\r\n"), end="close"),
    one("a reset", sized(JSON), answer(headers=b"Content-Length: 100\r\n", body=b"less"), end="reset"),
    one("a reset before the answer", sized(JSON), b"", end="reset"),
    one("more answers than requests", request(), OK + b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", end="close"),
    one("a websocket", (request(headers=UPGRADE), b"\x81\x85mask-hello\r\n\r\n"),
        answer(b"101 Switching Protocols", UPGRADE) + b"\x81\x05hello" + bytes(range(256)), after=0),
    one("a tunnel", (request(b"CONNECT x.example:443 HTTP/1.1"), b"\x16\x03\x01"), answer(b"200 Connected") + b"\x16\x03\x03", after=0),
    one("a tunnel that is refused", request(b"CONNECT x.example:443 HTTP/1.1"), answer(b"405 No", b"Content-Length: 2\r\n", b"no")),
]  # fmt: skip

SERIES = (
    Exchange((sized(JSON),), answer_sized()),
    Exchange((request(b"HEAD /x HTTP/1.1"),), answer(headers=b"Content-Length: 100\r\n")),
    Exchange((chunked(chunks(JSON)),), answer(headers=b"Transfer-Encoding: chunked\r\n", body=chunks(ANSWER))),
    Exchange((request(),), OK),
)
CONNECTIONS = [
    Case("one after the other", SERIES),
    Case("all at once", SERIES, at_once=True),
    Case("one after an upgrade that is refused", (Exchange((request(headers=UPGRADE),)), *SERIES), at_once=True),
    Case("one after a close", (SERIES[0], Exchange((request(headers=b"Connection: close\r\n"),), OK, end="close"))),
    Case("one after an error", (Exchange((sized(JSON),), answer(b"500 No", b"Content-Length: 0\r\n")), *SERIES)),
    Case(
        "one after early hints",
        (Exchange((request(),), b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK), *SERIES),
        at_once=True,
    ),
]

PASSED = [*METHODS, *TARGETS, *HEADERS, *BODIES, *ANSWERS, *CONNECTIONS]

# ---------------------------------------------------------------- requests that parsers would split differently

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def twice(headers: bytes, body: bytes = b"", line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
    return request(line, headers, body + SMUGGLED)


CL, TE = b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"
LAST = b"0\r\n\r\n"
REFUSED = {
    "length and chunks": twice(CL + TE, LAST),
    "chunks and length": twice(TE + CL, LAST),
    "two lengths": twice(CL + b"Content-Length: 40\r\n", b"abcd"),
    "two lengths in one": twice(b"Content-Length: 4, 40\r\n", b"abcd"),
    "length +4": twice(b"Content-Length: +4\r\n", b"abcd"),
    "length -4": twice(b"Content-Length: -4\r\n"),
    "length 0x4": twice(b"Content-Length: 0x4\r\n", b"abcd"),
    "length 4a": twice(b"Content-Length: 4a\r\n", b"abcd"),
    "length 4.0": twice(b"Content-Length: 4.0\r\n", b"abcd"),
    "length 4_0": twice(b"Content-Length: 4_0\r\n", b"abcd"),
    "length, empty": twice(b"Content-Length:\r\n"),
    "length of 30 digits": twice(b"Content-Length: " + b"9" * 30 + b"\r\n"),
    "length in other digits": twice(b"Content-Length: \xd9\xa4\r\n", b"abcd"),
    "length and blank": twice(b"Content-Length : 4\r\n", b"abcd"),
    "length and tab": twice(b"Content-Length\t: 4\r\n", b"abcd"),
    "length, folded": twice(b"Content-Length:\r\n 4\r\n", b"abcd"),
    "blank and length": twice(b"X: 1\r\n Content-Length: 4\r\n", b"abcd"),
    "chunked and blank": twice(b"Transfer-Encoding : chunked\r\n", LAST),
    "chunked, folded": twice(b"Transfer-Encoding:\r\n chunked\r\n", LAST),
    "xchunked": twice(b"Transfer-Encoding: xchunked\r\n", LAST),
    "chunked twice": twice(b"Transfer-Encoding: chunked, chunked\r\n", LAST),
    "chunked and identity": twice(b"Transfer-Encoding: chunked, identity\r\n", LAST),
    "chunked, then gzip": twice(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n", LAST),
    "identity and length": twice(b"Transfer-Encoding: identity\r\n" + CL, b"abcd"),
    "chunked in quotes": twice(b'Transfer-Encoding: "chunked"\r\n', LAST),
    "chunked with a vertical tab": twice(b"Transfer-Encoding: \x0bchunked\r\n", LAST),
    "chunked;q=1": twice(b"Transfer-Encoding: chunked;q=1\r\n", LAST),
    "chunks of HTTP/1.0": twice(TE, LAST, b"POST /v1/completions HTTP/1.0"),
    "a line that ends with LF": twice(b"X: 1\n" + CL, b"abcd"),
    "a line that ends with CR": twice(b"X: 1\rContent-Length: 4\r\n", b"abcd"),
    "a head that ends with LF": b"GET / HTTP/1.1\nHost: x\n\n" + SMUGGLED,
    "NUL in a value": twice(b"X: a\0b\r\n"),
    "NUL in a name": twice(b"Content\0-Length: 4\r\n"),
    "a header without a colon": twice(b"Content-Length\r\n"),
    "a header without a name": twice(b": 4\r\n"),
    "a name with a bracket": twice(b"Transfer(Encoding): chunked\r\n"),
    "size -1": twice(TE, b"-1\r\na\r\n"),
    "size 0x1": twice(TE, b"0x1\r\na\r\n" + LAST),
    "size +1": twice(TE, b"+1\r\na\r\n" + LAST),
    "size of 20 digits": twice(TE, b"f" * 20 + b"\r\na\r\n" + LAST),
    "size, empty": twice(TE, b"\r\na\r\n" + LAST),
    "size and LF": twice(TE, b"1\na\r\n" + LAST),
    "chunk and LF": twice(TE, b"1\r\na\n" + LAST),
    "chunk beyond its size": twice(TE, b"1\r\nab\r\n" + LAST),
    "chunk without an end": twice(TE, b"1\r\na" + LAST),
    "a CR in an extension": twice(TE, b"1;a\rb\r\na\r\n" + LAST),
    "a trailer without a colon": twice(TE, b"0\r\nContent\r\n\r\n"),
    "no version": b"GET /x\r\n\r\n" + SMUGGLED,
    "version 2.0": b"GET /x HTTP/2.0\r\nHost: x\r\n\r\n" + SMUGGLED,
    "version 1.1 and more": b"GET /x HTTP/1.1 HTTP/1.0\r\nHost: x\r\n\r\n" + SMUGGLED,
    "no method": b" /x HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    "a method with a bracket": b"G{T /x HTTP/1.1\r\nHost: x\r\n\r\n" + SMUGGLED,
    "bytes of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n" + SMUGGLED,
}

NUM_CASES = len(PASSED) + len(REFUSED)
assert len({one.name for one in PASSED}) == len(PASSED)
assert all(itertools.chain(PASSED, REFUSED))

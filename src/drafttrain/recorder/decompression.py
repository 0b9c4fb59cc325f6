"""Decompresses bodies for the record, within a limit: a few bytes may decompress to gigabytes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from drafttrain.data_gen.serving_logs.exchange import Refused

MAX_CODINGS = 3
"""Codings of one body. More than one is unusual."""
STEP = 2**16
"""Bytes that are decompressed at once."""


def decompressed(body: bytes, encoding: str, *, limit: int) -> bytes:
    """Return a body without its content codings.

    Args:
        encoding: Value of Content-Encoding. The last coding was applied last.
        limit: Maximum bytes of the result and of every intermediate one.

    Raises:
        Refused: The body is too large or damaged, or its coding is not supported.
    """
    codings = [name for name in (one.strip().lower() for one in encoding.split(",")) if name not in ("", "identity")]
    if len(codings) > MAX_CODINGS:
        raise Refused("coding", f"{len(codings)} content codings, at most {MAX_CODINGS} are supported")
    for coding in reversed(codings):
        if coding not in CODINGS:
            raise Refused("coding", "unknown content coding")
        pieces, size = [], 0
        try:
            for piece in CODINGS[coding](body):
                size += len(piece)
                if size > limit:
                    raise Refused("too_large", f"longer than {limit} bytes when decompressed")
                pieces.append(piece)
        except Refused:
            raise
        except Exception as error:
            # Each library raises its own exception for damaged data.
            raise Refused("coding", f"the body is not valid {coding}: {type(error).__name__}") from error
        body = b"".join(pieces)
    return body


def _gzip(body: bytes) -> Iterator[bytes]:
    # A body may consist of several gzip members.
    while body:
        reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        yield from _inflated(reader, body)
        body = reader.unused_data


def _deflate(body: bytes) -> Iterator[bytes]:
    # The standard requires the zlib format. Some servers send raw deflate, which has another first byte.
    is_zlib = len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    yield from _inflated(zlib.decompressobj(wbits=zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS), body)


def _inflated(reader: zlib._Decompress, body: bytes) -> Iterator[bytes]:
    while not reader.eof:
        piece = reader.decompress(body, STEP)
        body = reader.unconsumed_tail
        if not piece and not body:
            raise EOFError
        yield piece


def _brotli(body: bytes) -> Iterator[bytes]:
    reader = _imported("brotli").Decompressor()
    if not hasattr(reader, "can_accept_more_data"):
        raise Refused("coding", "br needs brotli 1.2 or newer: older versions decompress without a limit")
    piece = reader.process(body, output_buffer_limit=STEP)
    while piece or not reader.is_finished():
        if not piece and reader.can_accept_more_data():
            raise EOFError
        yield piece
        piece = b"" if reader.is_finished() else reader.process(b"", output_buffer_limit=STEP)


def _zstd(body: bytes) -> Iterator[bytes]:
    # A frame may request a window as large as memory. Browsers and servers use at most 8 MiB.
    module = _imported("zstandard")
    reader = module.ZstdDecompressor(max_window_size=2**23).stream_reader(body, read_across_frames=True)
    while piece := reader.read(STEP):
        yield piece


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused("coding", f"{name} is not installed") from error


CODINGS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "gzip": _gzip,
    "x-gzip": _gzip,
    "deflate": _deflate,
    "br": _brotli,
    "zstd": _zstd,
}

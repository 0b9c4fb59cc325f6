"""Digests of what a path holds: whole files of text, weights by their header and samples, so that 100 GB take seconds.

A file of weights of at most `WHOLE_BYTES` is read whole. Of a larger one these are read: its size, its header (name, type, shape and
place of every tensor), and the beginning, middle and end of every tensor. Any training changes those. What changes single rows in
between, and leaves all that as it was, is not seen.

Digests of large files are kept in the user's cache by path, size, time of change and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from drafttrain.core.files import sha256_of, write_json

WHOLE_BYTES = 64 << 20
BLOCK_BYTES = 4096
NUM_BLOCKS = 4096
"""Of a file without a header that can be read."""
MAX_HEADER_BYTES = 100 << 20
SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again within one tick of the clock of its disk: it is not cached."""


def text_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, all of them."""
    return _cached(path, "whole", sha256_of)


def weights_digest(path: Path) -> str:
    """Return a digest of a file of weights: SHA-256 of all its bytes, or of samples where it is large."""
    return _cached(path, "sampled", _sampled) if path.stat().st_size > WHOLE_BYTES else sha256_of(path)


def files_digest(paths: Iterable[Path]) -> str:
    """Return a short digest of files by name and content."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}:{text_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(f"sampled {size}\n".encode())
    with path.open("rb") as file:
        for start in _places(file, size):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _places(file: BinaryIO, size: int) -> Iterator[int]:
    """Yield where the blocks begin that stand for a file."""
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("no header")
        header = json.loads(file.read(length))
        spans = sorted(tuple(map(int, one["data_offsets"])) for name, one in header.items() if name != "__metadata__")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        yield from range(0, size, max(BLOCK_BYTES, size // NUM_BLOCKS))
        return
    yield from range(0, 8 + length, BLOCK_BYTES)
    for begin, end in spans:
        places = {begin, (begin + end) // 2, max(begin, end - BLOCK_BYTES)}
        yield from (8 + length + place for place in sorted(places))


def _cached(path: Path, how: str, digest_of: Callable[[Path], str]) -> str:
    stat = path.stat()
    if stat.st_size <= WHOLE_BYTES:
        return digest_of(path)
    key, mark = f"{how}:{path.resolve()}", [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    held = _held().get(key)
    if isinstance(held, list) and held[:-1] == mark:
        return str(held[-1])
    digest = digest_of(path)
    if time.time_ns() - stat.st_mtime_ns > SETTLED_SECONDS * 1e9:
        with contextlib.suppress(OSError):
            write_json(_cache_file(), _held() | {key: [*mark, digest]})
    return digest


def _cache_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "drafttrain" / "digests.json"


def _held() -> dict[str, Any]:
    try:
        held = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}

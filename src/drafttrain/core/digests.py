"""Digests of files: text is read whole; large weights are sampled, so that 100 GB take seconds.

A weights file of at most `WHOLE_BYTES` is read whole. From a larger one, the digest covers its size, its header (name, type,
shape and offsets of every tensor), and the beginning, middle and end of every tensor. Any training changes these. An edit
of single rows in between is not noticed.

Digests of large files are cached in the user's cache folder by path, size, modification time and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from drafttrain.core.files import sha256_of, user_cache, write_json

WHOLE_BYTES = 64 << 20
BLOCK_BYTES = 4096
NUM_BLOCKS = 4096
"""Samples of a file without a readable header."""
MAX_HEADER_BYTES = 100 << 20
SETTLED_SECONDS = 2.0
"""A file modified more recently than this may change again within its disk's clock resolution, so it is not cached."""


def text_digest(path: Path) -> str:
    """Return the SHA-256 of all of a file's bytes."""
    return _cached(path, "whole", sha256_of)


def weights_digest(path: Path) -> str:
    """Return the digest of a weights file: SHA-256 of all its bytes, or of samples if it is large."""
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
    """Yield the offsets of the blocks that are sampled."""
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
    return user_cache() / "digests.json"


def _held() -> dict[str, Any]:
    try:
        held = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}

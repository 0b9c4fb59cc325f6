"""Atomic files: written under a temporary name, then renamed.

Temporary names are `.<name>.<letters>.part`, so that leftovers of a killed process can be recognized and removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, quota exceeded, file too large."""


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; rename it to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    os.chmod(temporary, 0o644)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; it replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    os.chmod(temporary, 0o755)
    try:
        try:
            yield temporary
        except SafetensorError as error:
            # Readers raise errors of their own. What is left is a failed write: a full disk, a size limit.
            raise OSError(0, str(error), str(path)) from error
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def only_full(error: OSError) -> OSError:
    """Return the error if it means that the disk is full; raise any other.

    Native writers pass on the text of the error without its number.
    """
    if error.errno in FULL or any(os.strerror(number) in str(error) for number in FULL):
        return error
    raise error


def clear_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed processes in a folder. No process may be writing there now.

    A folder that was moved away to be replaced is restored if its replacement never came.
    """
    for old in list(folder.rglob(".*.old")):
        path = old.with_name(old.name[1:].removesuffix(".old"))
        if not path.exists():
            os.replace(old, path)
    for left in [*folder.rglob("*.part"), *folder.rglob(".*.old")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def lock(file: int, *, wait: bool) -> bool:
    """Lock an open file against other processes until it is closed; return whether this process has the lock.

    Some network disks have no locks; there it always returns True.

    Args:
        wait: Wait until another process releases it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: fsync of a file does not flush its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Unpaired surrogates are written as `\\udcff`, which JSON reads back."""
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given. NaN and infinity become null: JSON cannot express them."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def user_cache() -> Path:
    """Return drafttrain's folder in the user's cache: `$XDG_CACHE_HOME/drafttrain`, by default `~/.cache/drafttrain`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "drafttrain"


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

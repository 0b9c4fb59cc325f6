"""The lines of log files, plain or gzip; a line longer than the limit is never held in memory."""

from __future__ import annotations

import glob
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, cast

from drafttrain.core.errors import DataError

ROTATED = re.compile(r"^(.*?)\.(?:(\d{1,6})|(\d{4}-\d\d-\d\d[\w.-]*?))$")
BUILTIN = "builtin:"
"""Prefix of logs that come with drafttrain."""
SKIP_BYTES = 1 << 20
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
"""Exceptions for a gzip file that is cut off, or is not one."""


@dataclass(frozen=True)
class Line:
    """One line."""

    end: int
    """Offset of the next line in the (unpacked) file, in bytes."""
    data: bytes | None
    """None: it was longer than the limit."""
    whole: bool = True
    """False: the file ends before the line does."""


def log_files(path: str) -> list[Path]:
    """Return the files of a folder, a path, a pattern or a builtin log; rotated files (.1, or a date at the end) oldest first.

    Raises:
        DataError: There is no such folder or file.
    """
    place = Path(path).expanduser()
    if path.startswith(BUILTIN):
        place = Path(str(resources.files("drafttrain") / "builtin" / path.removeprefix(BUILTIN)))
    if place.is_dir():
        found = list(place.iterdir())
    else:
        found = [place] if place.is_file() else [Path(name) for name in glob.glob(str(place), recursive=True)]
        if not found:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    return sorted((file for file in found if file.is_file() and not file.name.startswith(".")), key=_age)


def opened(path: Path) -> IO[bytes]:
    """Return a log file for reading, unpacked."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def lines(file: IO[bytes], *, start: int, max_bytes: int) -> Iterator[Line]:
    """Yield the lines from byte `start`, where the file is positioned; the last one even if it is incomplete."""
    end = start
    while piece := file.readline(max_bytes + 1):
        end += len(piece)
        if len(piece) <= max_bytes or piece.endswith(b"\n"):
            yield Line(end, piece, whole=piece.endswith(b"\n"))
            continue
        while (piece := file.readline(SKIP_BYTES)) and not piece.endswith(b"\n"):
            end += len(piece)
        end += len(piece)
        yield Line(end, None, whole=piece.endswith(b"\n"))


def _age(path: Path) -> tuple[str, int, int, str]:
    name = str(path).removesuffix(".gz")
    if rotated := ROTATED.match(name):
        base, number, date = rotated.groups()
        return base, 0, -int(number or 0), date or ""
    return name, 1, 0, ""

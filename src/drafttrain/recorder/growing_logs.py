"""Reads a folder of logs while it is written. Files are recognized by their content, not by their names.

Rotation renames a log, copies and truncates it, or compresses it. All of these leave the bytes that were read before at their offsets.
So a file continues a place if it has the place's first and last bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from drafttrain.core.errors import DataError
from drafttrain.data_gen.serving_logs.lines import DAMAGED, Line, lines, log_files, opened

DIGEST_BYTES = 4096
MAX_PLACES = 1000
"""Logs that are remembered after their files are gone."""
MAX_STATES = 8


@dataclass(frozen=True)
class Place:
    """How far one log was read."""

    offset: int = 0
    """Bytes of complete lines, decompressed."""
    head: str = ""
    """Digest of the first of these bytes."""
    tail: str = ""
    """Digest of the last of these bytes."""
    inode: int = 0
    states: tuple[str, ...] = field(default=())
    """Files (inode, size, time) that were read to their end, including copies."""

    @staticmethod
    def of(file: IO[bytes], offset: int, **more: object) -> Place | None:
        """Return the place that ends at an offset of a file; None: the file is shorter."""
        length = min(DIGEST_BYTES, offset)
        file.seek(0)
        head = file.read(length)
        file.seek(offset - length)
        tail = file.read(length)
        return Place(offset, _digest(head), _digest(tail), **more) if len(tail) == length else None  # type: ignore[arg-type]

    def ends_in(self, file: IO[bytes]) -> bool:
        """Return whether a file begins with the bytes that were read, judged by the first and last of them."""
        found = Place.of(file, self.offset)
        return found is not None and (self.offset == 0 or (found.head, found.tail) == (self.head, self.tail))


@dataclass(frozen=True)
class _Listed:
    """A file when the folder was listed. Rotation may give its name to another file at any moment."""

    path: Path
    inode: int
    size: int
    state: str

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, decompressed.

        Raises:
            FileNotFoundError: It was renamed or removed.
        """
        with opened(self.path) as file:
            if os.fstat(file.fileno()).st_ino != self.inode:
                raise FileNotFoundError(f"{self.path}: replaced by another file")
            yield file


CHANGED = (FileNotFoundError, *DAMAGED)
"""Raised when a file is rotated or compressed while it is read. It is read after the next listing."""


def follow(
    path: str, places: Sequence[Place], *, max_line_bytes: int, max_lines: int
) -> tuple[list[tuple[str, Line]], list[Place]]:
    """Return the next complete lines after the places, each with its position, and the places after these lines.

    An incomplete line is left for the next call, and so is a gzip file without its end, or a file that is renamed meanwhile.

    Raises:
        DataError: There is no log, and none was read before.
    """
    places = list(places)
    try:
        files = _listed(path)
    except DataError:
        if not places:
            raise
        files = []  # In the middle of a rotation there may be no log.
    done = {state for place in places for state in place.states}
    found: list[tuple[str, Line]] = []
    # An empty file may become a copy: its first bytes will show it.
    to_read = [file for file in files if file.size and file.state not in done]
    for file, number in _assigned(to_read, files, places):
        if len(found) >= max_lines:
            break
        with suppress(*CHANGED):
            read, places[number] = _read_on(file, places[number], max_line_bytes, max_lines - len(found))
            found += read
    return found, _without_old(places, files)


def _without_old(places: list[Place], files: list[_Listed]) -> list[Place]:
    """Return the places, without the oldest ones whose files are gone if there are too many of those."""
    inodes, states = {file.inode for file in files}, {file.state for file in files}
    # A truncated file keeps its inode and is another log.
    newest = {place.inode: number for number, place in enumerate(places)}
    gone = [
        number
        for number, place in enumerate(places)
        if (place.inode not in inodes or newest[place.inode] != number) and not states & {*place.states}
    ]
    forgotten = set(gone[:-MAX_PLACES])
    return [place for number, place in enumerate(places) if number not in forgotten]


def _listed(path: str) -> list[_Listed]:
    """Return the files in the order of `log_files`. A file with two names is listed once."""
    files: dict[str, _Listed] = {}
    for file in log_files(path):
        with suppress(FileNotFoundError):
            about = file.stat()
            state = f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"
            files.setdefault(state, _Listed(file, about.st_ino, about.st_size, state))
    return list(files.values())


def _assigned(files: list[_Listed], listed: list[_Listed], places: list[Place]) -> list[tuple[_Listed, int]]:
    """Return each file to read with the number of its place, including new ones. A copy of another file is not read.

    Args:
        listed: All files, including those that were read to their end.
    """
    logs: list[_Log] = []
    for file in files:
        with suppress(*CHANGED), file.opened() as opened_file:
            logs.append(_Log(opened_file, file, places))
    chosen: list[tuple[_Log, int]] = []
    for log in sorted(logs, key=lambda log: log.rank, reverse=True):
        original = next(
            (number for other, number in chosen if other.may_begin_with(log) and log.begins(other.file)), None
        )
        if original is not None:
            # As long as it was not read completely, it may become the only file of this log.
            if log.size <= places[original].offset:
                states = (*places[original].states, log.file.state)[-MAX_STATES:]
                places[original] = replace(places[original], states=states)
        elif not log.is_being_copied(listed, places):
            chosen.append((log, _number_of(log, places, taken={number for _, number in chosen})))
    numbers = {log.file: number for log, number in chosen}
    return [(file, numbers[file]) for file in files if file in numbers]


def _number_of(log: _Log, places: list[Place], *, taken: set[int]) -> int:
    """Return the number of the place from which to read a log. A new log gets a new place, and so does the second log of one place."""
    number, inode = log.number, log.file.inode
    if number is not None and number not in taken:
        places[number] = replace(places[number], inode=inode)
        return number
    places.append(Place(inode=inode) if number is None else replace(places[number], inode=inode, states=()))
    return len(places) - 1


def _read_on(file: _Listed, place: Place, max_line_bytes: int, max_lines: int) -> tuple[list[tuple[str, Line]], Place]:
    """Return the next complete lines of a file, and the place after them.

    Raises:
        FileNotFoundError: The file was renamed or truncated while it was read, so its lines are discarded.
    """
    found: list[tuple[str, Line]] = []
    with file.opened() as opened_file:
        opened_file.seek(place.offset)
        offset, at_end = place.offset, True
        for line in lines(opened_file, start=place.offset, max_bytes=max_line_bytes):
            if not line.whole and file.path.suffix != ".gz":
                break
            if len(found) >= max_lines:
                at_end = False
                break
            found.append((f"{file.path}@{offset}", line))
            offset = line.end
        states = (*place.states, file.state)[-MAX_STATES:] if at_end else place.states
        place_after = Place.of(opened_file, offset, inode=file.inode, states=states)
        if place_after is None or not place.ends_in(opened_file):
            raise FileNotFoundError(f"{file.path}: truncated while it was read")
    return found, place_after


class _Log:
    """The content of a file when it was opened. It may continue a log, or be a copy of one."""

    def __init__(self, opened_file: IO[bytes], file: _Listed, places: Sequence[Place]) -> None:
        self.file = file
        self._is_compressed = file.path.suffix == ".gz"
        self.size = _size(opened_file, is_compressed=self._is_compressed)
        opened_file.seek(0)
        self._start = opened_file.read(DIGEST_BYTES)
        self._heads: dict[int, str] = {}
        whole = Place.of(opened_file, self.size)
        if whole is None:
            raise FileNotFoundError(f"{file.path}: truncated while it was read")
        self._whole = whole
        self.number = self._continued_place(opened_file, places)
        """Number of the place that this file continues."""

    @property
    def rank(self) -> tuple[int, bool, Path]:
        """Of two logs with the same beginning, the longer one is read."""
        return self.size, not self._is_compressed, self.file.path

    def _continued_place(self, opened_file: IO[bytes], places: Sequence[Place]) -> int | None:
        """Return the number of the place that this file continues; of several, the one with the highest offset."""
        # Sorted by offset, so that a compressed file is decompressed only once.
        by_offset = sorted(enumerate(places), key=lambda one: (one[1].offset, one[1].inode == self.file.inode))
        matching = [number for number, place in by_offset if self._continues(opened_file, place)]
        return matching[-1] if matching else None

    def _continues(self, opened_file: IO[bytes], place: Place) -> bool:
        """Return whether the file begins with the bytes that were read up to a place."""
        if place.offset == 0:
            return place.inode == self.file.inode
        length = min(DIGEST_BYTES, place.offset)
        if self.size < place.offset or self._head(length) != place.head:
            return False
        opened_file.seek(place.offset - length)
        return _digest(opened_file.read(length)) == place.tail

    def may_begin_with(self, other: _Log) -> bool:
        """Return whether both files may have the same first bytes."""
        return self._start.startswith(other._start)

    def begins(self, file: _Listed) -> bool:
        """Return whether another file begins with the whole content of this one."""
        with suppress(*CHANGED), file.opened() as opened_file:
            return self._whole.ends_in(opened_file)
        return False

    def is_being_copied(self, listed: Sequence[_Listed], places: Sequence[Place]) -> bool:
        """Return whether this is an incomplete copy of a log that was read further."""
        is_start = len(self._start) == DIGEST_BYTES and any(
            self.size < place.offset and self._whole.head == place.head for place in places
        )
        if self.number is not None or self._is_compressed or not is_start:
            return False
        others = (file for file in listed if file.inode != self.file.inode and file.size > self.size)
        if any(file.path.suffix != ".gz" and self.begins(file) for file in others):
            return True
        # If the original was truncated since it was opened, the copy is complete by now.
        with suppress(FileNotFoundError):
            return self.file.path.stat().st_size != self.size
        return True

    def _head(self, length: int) -> str:
        if length not in self._heads:
            self._heads[length] = _digest(self._start[:length])
        return self._heads[length]


def _size(file: IO[bytes], *, is_compressed: bool) -> int:
    """Return the decompressed size of a file. A gzip file is read to its end, which shows whether it is complete."""
    if not is_compressed:
        return os.fstat(file.fileno()).st_size
    size = 0
    while piece := file.read(1 << 20):
        size += len(piece)
    return size


def _digest(piece: bytes) -> str:
    return hashlib.sha256(piece).hexdigest()[:32]

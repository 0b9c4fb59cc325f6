"""Reads on in a folder of logs that is written meanwhile: which files were read how far, by what they hold and not by their names.

A log that is rotated is renamed, copied and cut, or packed; all of these leave the bytes that were read before where they were,
so a file goes on where a place ends whose first and last bytes it has.
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
"""Logs that are remembered when their files are gone."""
MAX_STATES = 8


@dataclass(frozen=True)
class Place:
    """How far one log was read."""

    offset: int = 0
    """Bytes of whole lines, unpacked."""
    head: str = ""
    """Digest of the first of these bytes."""
    tail: str = ""
    """Digest of the last of these bytes."""
    inode: int = 0
    states: tuple[str, ...] = field(default=())
    """Files (inode, size, time) of which nothing was left to read, copies included."""

    @staticmethod
    def of(file: IO[bytes], offset: int, **more: object) -> Place | None:
        """Return the place that ends at a byte of a file; None: the file is shorter."""
        length = min(DIGEST_BYTES, offset)
        file.seek(0)
        head = file.read(length)
        file.seek(offset - length)
        tail = file.read(length)
        return Place(offset, _digest(head), _digest(tail), **more) if len(tail) == length else None  # type: ignore[arg-type]

    def ends_in(self, file: IO[bytes]) -> bool:
        """Tell whether a file begins with the bytes that were read, as far as their first and last ones tell."""
        found = Place.of(file, self.offset)
        return found is not None and (self.offset == 0 or (found.head, found.tail) == (self.head, self.tail))


@dataclass(frozen=True)
class _Listed:
    """A file as it was when the folder was listed; rotation may give its name to another one at any later moment."""

    path: Path
    inode: int
    size: int
    state: str

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file for reading, unpacked.

        Raises:
            FileNotFoundError: It has another name by now, or is gone.
        """
        with opened(self.path) as file:
            if os.fstat(file.fileno()).st_ino != self.inode:
                raise FileNotFoundError(f"{self.path}: another file by now")
            yield file


CHANGED = (FileNotFoundError, *DAMAGED)
"""What reading a file raises that was rotated or is packed meanwhile: it waits for the next listing."""


def follow(
    path: str, places: Sequence[Place], *, max_line_bytes: int, max_lines: int
) -> tuple[list[tuple[str, Line]], list[Place]]:
    """Return the next whole lines behind the places, each with where it stands, and the places behind these lines.

    A line that is still written waits; so does a gzip file that does not end yet, and a file that changes its name meanwhile.

    Raises:
        DataError: There is no log, and none was read before.
    """
    places = list(places)
    try:
        files = _listed(path)
    except DataError:
        if not places:
            raise
        files = []  # Between the two steps of a rotation there is no log.
    present = {file.inode for file in files}
    done = {state for place in places for state in place.states}
    found: list[tuple[str, Line]] = []
    # What was empty may be the start of a copy: it shows with its first bytes what it is.
    to_read = [file for file in files if file.size and file.state not in done]
    for file, number in _assigned(to_read, places):
        if len(found) >= max_lines:
            break
        with suppress(*CHANGED):
            read, places[number] = _read_on(file, places[number], max_line_bytes, max_lines - len(found))
            found += read
    gone = [number for number, place in enumerate(places) if place.inode not in present]
    forgotten = set(gone[:-MAX_PLACES])
    return found, [place for number, place in enumerate(places) if number not in forgotten]


def _listed(path: str) -> list[_Listed]:
    """Return the files there are, in the order of `log_files`; one that has two names at once is listed once."""
    files: dict[str, _Listed] = {}
    for file in log_files(path):
        with suppress(FileNotFoundError):
            about = file.stat()
            state = f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"
            files.setdefault(state, _Listed(file, about.st_ino, about.st_size, state))
    return list(files.values())


def _assigned(files: list[_Listed], places: list[Place]) -> list[tuple[_Listed, int]]:
    """Return each file to read with the number of its place, new ones included; copies of what another file has are noted."""
    claims: dict[int, list[tuple[int, bool, Path, _Listed]]] = {}
    new: list[_Listed] = []
    for file in files:
        with suppress(*CHANGED), file.opened() as opened_file:
            log = _Log(opened_file, file)
            known = log.place(places)
            if known is None:
                if not log.is_part_of_one(places):
                    new.append(file)
            else:
                claims.setdefault(known, []).append((log.size, file.path.suffix != ".gz", file.path, file))
    chosen = {}
    for number, claimed in claims.items():
        *copies, (_, _, _, longest) = sorted(claimed, key=lambda claim: claim[:3])
        chosen[longest] = number
        states = tuple(file.state for _, _, _, file in copies)
        places[number] = replace(places[number], states=(*places[number].states, *states)[-MAX_STATES:])
    for file in new:
        chosen[file] = len(places)
        places.append(Place(inode=file.inode))
    return [(file, chosen[file]) for file in files if file in chosen]


def _read_on(file: _Listed, place: Place, max_line_bytes: int, max_lines: int) -> tuple[list[tuple[str, Line]], Place]:
    """Return the next whole lines of a file and the place behind them.

    Raises:
        FileNotFoundError: The file was renamed, or cut while it was read; what was read of it counts for nothing.
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
        behind = Place.of(opened_file, offset, inode=file.inode, states=states)
        if behind is None or not place.ends_in(opened_file):
            raise FileNotFoundError(f"{file.path}: was cut while it was read")
    return found, behind


class _Log:
    """A file that may be the rest of a log."""

    def __init__(self, file: IO[bytes], listed: _Listed) -> None:
        self._file = file
        self._inode = listed.inode
        self.size = _size(file, packed=listed.path.suffix == ".gz")
        file.seek(0)
        self._start = file.read(DIGEST_BYTES)
        self._heads: dict[int, str] = {}

    def place(self, places: Sequence[Place]) -> int | None:
        """Return the number of the place that this file goes on from."""
        return next((number for number, place in enumerate(places) if self._goes_on(place)), None)

    def is_part_of_one(self, places: Sequence[Place]) -> bool:
        """Tell whether the file is shorter than a log that begins like it: most likely a copy that is still written."""
        whole = len(self._start) == DIGEST_BYTES
        return whole and any(self.size < place.offset and self._head(DIGEST_BYTES) == place.head for place in places)

    def _goes_on(self, place: Place) -> bool:
        """Tell whether the file begins with the bytes that were read up to a place."""
        if place.offset == 0:
            return place.inode == self._inode
        head = self._head(min(DIGEST_BYTES, place.offset))
        return self.size >= place.offset and head == place.head and place.ends_in(self._file)

    def _head(self, length: int) -> str:
        if length not in self._heads:
            self._heads[length] = _digest(self._start[:length])
        return self._heads[length]


def _size(file: IO[bytes], *, packed: bool) -> int:
    """Return the size of a file, unpacked; a gzip file is read to its end, which tells whether it is whole."""
    if not packed:
        return os.fstat(file.fileno()).st_size
    size = 0
    while piece := file.read(1 << 20):
        size += len(piece)
    return size


def _digest(piece: bytes) -> str:
    return hashlib.sha256(piece).hexdigest()[:32]

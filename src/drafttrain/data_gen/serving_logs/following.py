"""Reads on in a folder of logs that is written meanwhile: which files were read how far, by what they hold and not by their names.

A log that is rotated is renamed, copied and cut, or packed; all of these leave the bytes that were read before where they were,
so a file goes on where a place ends whose first and last bytes it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

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
    def of(file: IO[bytes], offset: int, **more: object) -> Place:
        """Return the place that ends at a byte of a file."""
        file.seek(0)
        head = _digest(file.read(min(DIGEST_BYTES, offset)))
        file.seek(max(0, offset - DIGEST_BYTES))
        return Place(offset, head, _digest(file.read(min(DIGEST_BYTES, offset))), **more)  # type: ignore[arg-type]


def follow(
    path: str, places: Sequence[Place], *, max_line_bytes: int, max_lines: int
) -> tuple[list[tuple[str, Line]], list[Place]]:
    """Return the next whole lines behind the places, each with where it stands, and the places behind these lines.

    A line that is still written waits; so does a gzip file that does not end yet.
    """
    places = list(places)
    done = {state for place in places for state in place.states}
    files, present = {}, set()
    for file in log_files(path):
        about = file.stat()
        present.add(about.st_ino)
        state = f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"
        if state not in done:
            files[file] = (state, about.st_ino)
    going_on = _assigned(files, places)
    found: list[tuple[str, Line]] = []
    for file, number in going_on.items():
        if len(found) >= max_lines:
            break
        state, inode = files[file]
        place = places[number]
        with opened(file) as opened_file:
            opened_file.seek(place.offset)
            offset, at_end = place.offset, True
            for line in lines(opened_file, start=place.offset, max_bytes=max_line_bytes):
                if not line.whole and file.suffix != ".gz":
                    break
                if len(found) >= max_lines:
                    at_end = False
                    break
                found.append((f"{file}@{offset}", line))
                offset = line.end
            states = (*place.states, state)[-MAX_STATES:] if at_end else place.states
            places[number] = Place.of(opened_file, offset, inode=inode, states=states)
    gone = [number for number, place in enumerate(places) if place.inode not in present]
    forgotten = set(gone[:-MAX_PLACES])
    return found, [place for number, place in enumerate(places) if number not in forgotten]


def _assigned(files: dict[Path, tuple[str, int]], places: list[Place]) -> dict[Path, int]:
    """Return for each file to read the number of its place, new ones included; copies of what another file has are noted."""
    claims: dict[int, list[tuple[int, bool, Path]]] = {}
    new: list[Path] = []
    for file, (_, inode) in files.items():
        try:
            with opened(file) as opened_file:
                log = _Log(opened_file, file, inode=inode)
                known = log.place(places)
        except DAMAGED:
            continue
        if known is None:
            new.append(file)
        else:
            claims.setdefault(known, []).append((log.size, file.suffix != ".gz", file))
    chosen = {}
    for number, claimed in claims.items():
        *copies, (_, _, longest) = sorted(claimed)
        chosen[longest] = number
        states = tuple(files[file][0] for _, _, file in copies)
        places[number] = replace(places[number], states=(*places[number].states, *states)[-MAX_STATES:])
    for file in new:
        chosen[file] = len(places)
        places.append(Place(inode=files[file][1]))
    return {file: chosen[file] for file in files if file in chosen}


class _Log:
    """A file that may be the rest of a log."""

    def __init__(self, file: IO[bytes], path: Path, *, inode: int) -> None:
        self._file = file
        self._inode = inode
        self.size = _size(file, path)
        file.seek(0)
        self._start = file.read(DIGEST_BYTES)
        self._heads: dict[int, str] = {}

    def place(self, places: Sequence[Place]) -> int | None:
        """Return the number of the place that this file goes on from."""
        return next((number for number, place in enumerate(places) if self._goes_on(place)), None)

    def _goes_on(self, place: Place) -> bool:
        """Tell whether the file begins with the bytes that were read up to a place."""
        if place.offset == 0:
            return place.inode == self._inode
        length = min(DIGEST_BYTES, place.offset)
        if length not in self._heads:
            self._heads[length] = _digest(self._start[:length])
        if self.size < place.offset or self._heads[length] != place.head:
            return False
        return Place.of(self._file, place.offset).tail == place.tail


def _size(file: IO[bytes], path: Path) -> int:
    """Return the size of a file, unpacked; a gzip file is read to its end, which tells whether it is whole."""
    if path.suffix != ".gz":
        return path.stat().st_size
    size = 0
    while piece := file.read(1 << 20):
        size += len(piece)
    return size


def _digest(piece: bytes) -> str:
    return hashlib.sha256(piece).hexdigest()[:32]

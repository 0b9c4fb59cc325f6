"""The files of a shard: arrays, and a note with a checksum for each array and record, which is compared when rows are first read.

Checksums of records, not of files: nothing is read that a batch does not need, and a cache of any size opens at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drafttrain.core.errors import DataError
from drafttrain.core.files import only_full, write_json, written_beside


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard.

    Args:
        lengths: Rows of its records, in the order of the rows.
    """

    folder: Path
    number: int
    lengths: tuple[int, ...]

    def path(self, name: str) -> Path:
        """Return the file of an array."""
        return self.folder / f"{name}-{self.number:05d}.npy"

    @property
    def note(self) -> Path:
        """The file of the checksums."""
        return self.folder / f"shard-{self.number:05d}.json"

    def write(self, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write arrays, then their checksums and what else is known about them.

        Raises:
            DataError: The disk is full. Files of other shards are whole.
        """
        try:
            for name, array in arrays.items():
                with written_beside(self.path(name)) as temporary, temporary.open("wb") as file:
                    # `np.save` writes through C, which loses the number of the error.
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                    file.write(np.ascontiguousarray(array).data)
                _damaged(self.path(name)).unlink(missing_ok=True)
            checks = {name: self._checksums(array) for name, array in arrays.items()}
            write_json(self.note, self.about() | {"checks": self.checks() | checks} | dict(about))
        except OSError as error:
            reason = only_full(error)
            raise DataError(
                f"{self.folder}: no room for shard {self.number} of the cached target outputs ({reason.strerror or reason}). "
                "The shards before it are whole: make room and run the same command to continue"
            ) from error

    def clear(self) -> None:
        """Remove the files of this shard."""
        for path in [*self.folder.glob(f"*-{self.number:05d}.npy"), self.note]:
            path.unlink(missing_ok=True)

    def has(self, arrays: Mapping[str, tuple[tuple[int, ...], Any]]) -> bool:
        """Return whether arrays of these shapes and types are here, with a note; a shard of an earlier version has none, and gets one."""
        for name, (shape, dtype) in arrays.items():
            try:
                array = self.open(name)
            except (OSError, ValueError):  # missing; cut short
                return False
            if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
                return False
        if not set(arrays) <= self.checks().keys():
            self.write({}, {"checks": self.checks() | {name: self._checksums(self.open(name)) for name in arrays}})
        return True

    def holds(self, names: Iterable[str]) -> bool:
        """Return whether these arrays were written, and are here."""
        checks = self.checks()
        return all(name in checks and self.path(name).exists() for name in names)

    def open(self, name: str) -> Any:
        """Return an array, memory-mapped."""
        return np.load(self.path(name), mmap_mode="r", allow_pickle=False)

    def about(self) -> dict[str, Any]:
        """Return what is known about the arrays."""
        try:
            return dict(json.loads(self.note.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def checks(self) -> dict[str, list[int]]:
        """Return checksums by array, in the order of the records."""
        return dict(self.about().get("checks", {}))

    def check(self, name: str, array: Any, place: int, wanted: int) -> None:
        """Compare the rows of the record at a place with their checksum.

        Raises:
            DataError: They differ. The file has another name then, and the next run of the same command writes this shard again.
        """
        begin = sum(self.lengths[:place])
        if zlib.crc32(_bytes(array[begin : begin + self.lengths[place]])) == wanted:
            return
        path, damaged = self.path(name), _damaged(self.path(name))
        with contextlib.suppress(FileNotFoundError):  # another process renamed it
            os.replace(path, damaged)
        raise DataError(
            f"{path}: {self.lengths[place]} rows from row {begin} on differ from their checksum: the disk or the memory changed "
            f"them. The file is now {damaged.name}. Run the same command again: it writes only this shard again"
        )

    def _checksums(self, array: Any) -> list[int]:
        return [zlib.crc32(_bytes(rows)) for rows in self._parts(array)]

    def _parts(self, array: Any) -> Iterator[Any]:
        ends: Sequence[int] = np.cumsum(self.lengths).tolist()
        for length, end in zip(self.lengths, ends, strict=True):
            yield array[end - length : end]


def _damaged(path: Path) -> Path:
    return path.with_name(f"{path.name}.damaged")


def _bytes(rows: Any) -> Any:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)

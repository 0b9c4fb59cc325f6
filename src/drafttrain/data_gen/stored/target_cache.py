"""Cached target outputs on the records that training will read, so that a step need not run the target.

B = sequences, T = positions
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from drafttrain.core.batches import DraftBatch
from drafttrain.data_gen.stored.arriving import Arriving
from drafttrain.data_gen.stored.row_layout import RowLayout
from drafttrain.data_gen.stored.shard_files import ShardFiles
from drafttrain.data_gen.stored.stored_states import as_tensor
from drafttrain.data_gen.stored.wanted import SUMS, Wanted, with_arrays
from drafttrain.target_model import Target


@dataclass(frozen=True)
class _Shard:
    """What a reader has opened of a shard."""

    arrays: Mapping[str, Any]
    """Memory-mapped."""
    checks: Mapping[str, Sequence[int]]
    """Checksums of the records."""


class RowCache:
    """Cached target outputs of one store: one row a token, with the states there and the distribution of the next token.

    `states` stores final states, from which the target's own head computes the distribution; `full` stores logits; `top_k` stores the
    largest log-probabilities and spreads the rest of the probability evenly over the other tokens.

    Args:
        layout: Where the rows are; None: as cache.json says.
        arriving: Another process is still writing shards: reading waits for them.
        with_sums: It writes the sums over the vocabulary too.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        wanted: Wanted,
        *,
        layout: RowLayout | None = None,
        arriving: Arriving | None = None,
        with_sums: bool = False,
    ) -> None:
        self.wanted = wanted
        self.layout = layout or _stored_layout(folder)
        self.files = shard_files(folder, self.layout)
        self._model = target.model
        self._num_tokens = target.num_tokens
        self._arriving = arriving
        if arriving is None:
            with_sums = "final" in wanted.arrays and all(files.holds(SUMS) for files in self.files)
        self._sums = SUMS if with_sums else ()
        self._shards: dict[int, _Shard] = {}
        self._checked: set[tuple[str, int]] = set()

    def shard(self, name: str, number: int) -> Tensor:
        """Return an array of a shard."""
        for record in self.layout.shards[number]:
            self._checked_rows(name, record)
        return as_tensor(np.array(self._opened(number).arrays[name]), self.wanted.dtype)

    @property
    def batch_arrays(self) -> list[str]:
        """Names of the arrays that a batch carries."""
        return [*self.wanted.arrays, *(self._sums if self.wanted.distribution == "states" else ())]

    def has(self, record: int) -> bool:
        """Return whether the record's rows are stored."""
        return record in self.layout.sizes

    def stored(self, record: int, count: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return arrays of the first `count` rows of a record, in their stored types.

        Args:
            names: Arrays to read; None: all.
        """
        chosen = self.wanted.arrays if names is None else names
        rows = {name: np.concatenate([part for _, part in self.rows(name, record, count)]) for name in chosen}
        return {name: as_tensor(array, self.wanted.dtype) for name, array in rows.items()}

    def rows(self, name: str, record: int, count: int) -> Iterator[tuple[int, Any]]:
        """Yield the first rows of a record of one array in pieces, memory-mapped, each with the place of its first row.

        Raises:
            DataError: A row is not what was written.
        """
        for piece in self.layout.pieces(record):
            if piece.first < count:
                own = self._checked_rows(name, piece.owner)
                skipped = self.layout.skipped(piece.owner)
                yield piece.first, own[piece.first - skipped : min(piece.end, count) - skipped]

    def _checked_rows(self, name: str, record: int) -> Any:
        """Return the rows that are stored with a record. Those that are read for the first time are compared with their checksum."""
        number, begin = self.layout.place(record)
        shard = self._opened(number)
        array = shard.arrays[name]
        if (name, record) not in self._checked:
            place = self.layout.shards[number].index(record)
            self.files[number].check(name, array, place, shard.checks[name][place])
            self._checked.add((name, record))
        return array[begin : begin + self.layout.sizes[record] - self.layout.skipped(record)]

    def like(self, name: str) -> Any:
        """Return no row of an array."""
        return self._opened(0).arrays[name][:0]

    def _opened(self, number: int) -> _Shard:
        if number not in self._shards:
            files, names = self.files[number], [*self.wanted.arrays, *self._sums]
            if self._arriving is not None:
                self._arriving.wait(files, names)
            self._shards[number] = _Shard({name: files.open(name) for name in names}, files.checks())
        return self._shards[number]

    def with_arrays(self, batch: DraftBatch, arrays: Mapping[str, Tensor]) -> DraftBatch:
        """Return a batch with these arrays, laid out like it, as the target's outputs."""
        return with_arrays(batch, arrays, self.wanted, self._model, num_tokens=self._num_tokens)


def _stored_layout(folder: Path) -> RowLayout:
    about = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    return RowLayout(
        dict(zip(about["records"], about["sizes"], strict=True)),
        {int(record): (other, count) for record, (other, count) in about["shared"].items()},
    )


def shard_files(folder: Path, layout: RowLayout) -> list[ShardFiles]:
    """Return the files of each shard."""
    return [
        ShardFiles(folder, number, tuple(layout.sizes[record] - layout.skipped(record) for record in shard))
        for number, shard in enumerate(layout.shards)
    ]


def with_stored(
    batch: DraftBatch,
    places: Sequence[tuple[int, int]],
    members: Sequence[tuple[RowCache, int, int]],
) -> DraftBatch:
    """Return a packed batch with the stored target outputs, in their stored types.

    Args:
        places: Where each record begins in the batch.
        members: For each record its cache, its number there, and its number of tokens; all caches store the same outputs.
    """
    cache = members[0][0]
    arrays = {name: _laid_out(name, batch.tokens_BT.shape, places, members) for name in cache.batch_arrays}
    return cache.with_arrays(batch, arrays)


def _laid_out(
    name: str,
    shape: tuple[int, ...],
    places: Sequence[tuple[int, int]],
    members: Sequence[tuple[RowCache, int, int]],
) -> Tensor:
    """Return one array laid out like the batch; 0 at padding."""
    like = members[0][0].like(name)
    # numpy copies in this thread; torch would start more threads beside those that compute.
    array = np.zeros((*shape, *like.shape[1:]), like.dtype)
    for (row, column), (cache, record, count) in zip(places, members, strict=True):
        for first, rows in cache.rows(name, record, count):
            array[row, column + first : column + first + len(rows)] = rows
    return as_tensor(array, members[0][0].wanted.dtype)

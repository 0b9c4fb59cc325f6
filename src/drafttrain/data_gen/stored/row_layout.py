"""Where the rows of each record are in a cache. Rows of a common beginning are stored once.

A causal target's outputs at a token depend only on the tokens up to it. So records that begin with the same tokens (a system prompt,
several answers to one prompt, the turns of one chat) have equal rows there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from drafttrain.data_gen.groups import groups_in_order

TOKENS_A_SHARD = 16_384
LEAST_SHARED = 16
"""A shorter common beginning is stored with each record: every piece of a record is a read of its own."""

Shared = Mapping[int, tuple[int, int]]
"""By record: the record that it shares its first rows with, and how many. A record comes after the one that it names."""


@dataclass(frozen=True)
class Piece:
    """Successive rows of a record."""

    owner: int
    """The record that they are stored with."""
    first: int
    """The first of them, in that record and in this one."""
    end: int


class RowLayout:
    """The rows that are stored with each record, and in which shard. `shards` are the records that rows are stored with.

    Args:
        sizes: Tokens of each record, in the order of their rows.
        shared: See `shared_beginnings`.
    """

    def __init__(self, sizes: Mapping[int, int], shared: Shared) -> None:
        self.sizes = dict(sizes)
        self._skipped = {record: count for record, (_, count) in shared.items()}
        self._before: dict[int, list[Piece]] = {}
        for record, (other, count) in shared.items():
            self._before[record] = _cut(self.pieces(other), count)
        own = {record: size - self.skipped(record) for record, size in self.sizes.items()}
        self.num_rows = sum(own.values())
        # All rows of a copy, or of the beginning of another record, are stored with others: the target need not read it.
        records = [record for record, count in own.items() if count]
        grouped = groups_in_order([own[record] for record in records], tokens=TOKENS_A_SHARD)
        self.shards = [[records[i] for i in group] for group in grouped]
        self._place: dict[int, tuple[int, int]] = {}
        for number, shard in enumerate(self.shards):
            begin = 0
            for record in shard:
                self._place[record] = number, begin
                begin += own[record]

    def skipped(self, record: int) -> int:
        """Return how many of a record's first rows are stored with others."""
        return self._skipped.get(record, 0)

    def place(self, record: int) -> tuple[int, int]:
        """Return the shard of a record's own rows, and the first of them there."""
        return self._place[record]

    def pieces(self, record: int) -> list[Piece]:
        """Return the pieces of a record in order."""
        skipped, size = self.skipped(record), self.sizes[record]
        own = [Piece(record, skipped, size)] if skipped < size else []
        return [*self._before.get(record, ()), *own]

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        return sum(self.sizes[record] - self.skipped(record) for record in self.shards[shard])


def _cut(pieces: Sequence[Piece], count: int) -> list[Piece]:
    return [Piece(one.owner, one.first, min(one.end, count)) for one in pieces if one.first < count]


def shared_beginnings(texts: Mapping[int, Any]) -> dict[int, tuple[int, int]]:
    """Return for records with a common beginning of at least `LEAST_SHARED` tokens where its rows are stored.

    In the order of their tokens, a record has its longest common beginning with the one before it, so that every beginning is stored
    once.

    Args:
        texts: By record, tokens_T as uint32.
    """
    order = sorted(texts, key=lambda record: (texts[record].astype(">u4").tobytes(), record))
    return {record: (other, count) for other, record, count in _common(texts, order) if count >= LEAST_SHARED}


def _common(texts: Mapping[int, Any], order: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for other, record in pairwise(order):
        length = min(len(texts[other]), len(texts[record]))
        differs_T = texts[other][:length] != texts[record][:length]
        yield other, record, int(differs_T.argmax()) if differs_T.any() else length

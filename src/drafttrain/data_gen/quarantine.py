"""Reads items one by one: items that give nothing are quarantined with their reasons; too many of them stop the run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import written_beside
from drafttrain.data_gen.bad_item import BadItem
from drafttrain.data_gen.serving_logs.untrusted import guard
from drafttrain.data_gen.sources import Item, Source

T = TypeVar("T")

SHOWN = 3
"""How many reasons are printed; all are in the file."""
KINDS_SHOWN = 6


def read_items(
    source: Source,
    read: Callable[[Item], Sequence[T]],
    file: Path,
    *,
    name: str,
    max_items: int | None = None,
    max_lost_share: float = 1.0,
) -> Iterator[T]:
    """Yield what `read` returns for the items of a source; write the items that it refuses into `file`.

    Raises:
        DataError: Nothing is left, or more than `max_lost_share` of the items are quarantined.
    """
    found, lost = 0, Lost()
    with (
        progress(f"reading {name}", total=None, unit="items") as bar,
        # The file is complete or absent: several processes of a run may read the same source.
        written_beside(file) as temporary,
        temporary.open("w", encoding="utf-8") as quarantine,
    ):
        for item in islice(source.items(), max_items):
            try:
                values = read_item(item, read)
            except BadItem as reason:
                values = []
                lost.add(item.where, str(reason))
                quarantine.write(_entry(item, str(reason)) + "\n")
                if lost.count <= SHOWN:
                    say(f"{item.where}: quarantined: {reason}")
            found += len(values)
            yield from values
            bar.advance(1)
        if bar.done and not found:
            raise DataError(lost.message(f"{name}: nothing is left of {bar.done:,} items"))
        lost.check(bar.done, name=name, max_share=max_lost_share)
    if lost.count:
        say(f"{name}: {lost.count:,} of {bar.done:,} items quarantined with their reasons in {file.name}")
        if len(lost.kinds) > 1:
            say(f"{name}: " + ", ".join(f"{kind} {n:,}" for kind, n in lost.kinds.most_common(KINDS_SHOWN)))
    if not found:
        raise DataError(f"{name}: it has no items")


def read_item(item: Item, read: Callable[[Item], Sequence[T]]) -> Sequence[T]:
    """Return what `read` returns for an item.

    Raises:
        BadItem: It is refused. The reason does not repeat the content of a private item.
    """
    if item.problem:
        raise BadItem(item.problem)
    with guard() if item.private else nullcontext():
        return read(item)


class Lost:
    """Counts quarantined items by the kind of their reason."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Quarantined items."""
        return sum(self.kinds.values())

    def add(self, where: str, reason: str) -> None:
        """Count an item."""
        kind = kind_of(reason)
        self.kinds[kind] += 1
        self._first.setdefault(kind, f"{where}: {reason}")

    def check(self, items: int, *, name: str, max_share: float) -> None:
        """Stop if more items are quarantined than the settings allow.

        Raises:
            DataError: With the reasons counted.
        """
        if self.count > max_share * items:
            what = f"{self.count:,} of {items:,} items are quarantined ({self.count / items:.1%})"
            raise DataError(self.message(f"{name}: {what}; max_lost_share of the source allows {max_share:.1%}"))

    def message(self, what: str) -> str:
        """Return a message with the count of each kind of reason and its first item."""
        lines = [f"{count:,} x {self._first[kind]}" for kind, count in self.kinds.most_common(KINDS_SHOWN)]
        if len(self.kinds) > KINDS_SHOWN:
            lines.append(f"and {len(self.kinds) - KINDS_SHOWN} more kinds of reasons")
        return "\n  ".join([what, *lines])


def _entry(item: Item, reason: str) -> str:
    entry: dict[str, Any] = {"where": item.where, "reason": reason}
    if item.private:
        return json.dumps(entry)
    try:
        return json.dumps(entry | {"item": item.value}, default=str)
    except (RecursionError, ValueError, TypeError):
        # Nested too deeply for JSON: the place and the reason are enough to find it.
        return json.dumps(entry)


def kind_of(reason: str) -> str:
    """Return the kind of a reason: its text up to the first colon, without the numbers of turns."""
    return re.sub(r"\.\d+", "", reason.partition(":")[0])[:80]


def lost_of(file: Path) -> Lost:
    """Return the counts of a file of quarantined items."""
    lost = Lost()
    with file.open(encoding="utf-8") as entries:
        for entry in map(json.loads, entries):
            lost.add(entry["where"], entry["reason"])
    return lost

"""Items read one by one: those that give nothing are set aside with their reasons, and stop no run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TypeVar

from drafttrain.core.console import progress, say
from drafttrain.core.errors import DataError
from drafttrain.core.files import written_beside
from drafttrain.data_gen.formats import BadItem
from drafttrain.data_gen.serving_logs.untrusted import guard
from drafttrain.data_gen.sources import Item, Source

T = TypeVar("T")

SHOWN = 3
"""Items set aside whose reasons are printed; all are in the file."""


def read_items(
    source: Source, read: Callable[[Item], Sequence[T]], file: Path, *, name: str, max_items: int | None = None
) -> Iterator[T]:
    """Yield what `read` makes of the items of a source; write into `file` those of which it makes nothing.

    Raises:
        DataError: Nothing is left.
    """
    refused, found = 0, 0
    with (
        progress(f"reading {name}", total=None, unit="items") as bar,
        # Whole or absent: every process of a run may read the same source.
        written_beside(file) as temporary,
        temporary.open("w", encoding="utf-8") as quarantine,
    ):
        for item in islice(source.items(), max_items):
            try:
                if item.problem:
                    raise BadItem(item.problem)
                # What a private item holds must not be repeated by the reason against it.
                with guard() if item.private else nullcontext():
                    values = read(item)
            except BadItem as reason:
                values = []
                refused += 1
                entry = {"where": item.where, "reason": str(reason)} | ({} if item.private else {"item": item.value})
                quarantine.write(json.dumps(entry, default=str) + "\n")
                if refused <= SHOWN:
                    say(f"{item.where}: set aside: {reason}")
            found += len(values)
            yield from values
            bar.advance(1)
    if refused:
        say(f"{name}: {refused:,} of {bar.done:,} items set aside with their reasons in {file.name}")
    kinds = set_aside(file) if refused else Counter()
    if len(kinds) > 1:
        say(f"{name}: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(6)))
    if not found:
        raise DataError(f"{name}: nothing is left of {bar.done:,} items ({refused:,} set aside)")


def set_aside(file: Path) -> Counter[str]:
    """Return how many items were set aside for each kind of reason: its words up to the first colon."""
    with file.open(encoding="utf-8") as entries:
        return Counter(str(json.loads(entry)["reason"]).partition(":")[0][:80] for entry in entries)

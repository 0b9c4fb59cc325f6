"""Names of records. A record's name is its stream of random numbers, so no two have the same, and none says where a file lies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from drafttrain.data_gen.bad_item import BadItem


class Names:
    """Gives every record a name of its own, in the order of the data: one that is taken gets #1, #2, ..."""

    def __init__(self) -> None:
        self.num_shared = 0
        """Records whose own name an earlier one had."""
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def own(self, name: str) -> str:
        """Return this name, or where it is taken the next one of it that is free."""
        own, number = name, self._next.get(name, 0)
        while own in self._taken:
            number += 1
            own = f"{name}#{number}"
        self.num_shared += own != name
        self._next[name] = number
        self._taken.add(own)
        return own


def problem_of(name: str) -> str:
    """Return the name without the number of its use, the id that a problem with tests or marks has in its file."""
    whole, mark, number = name.rpartition("#")
    return whole if mark and number.isdecimal() else name


def content_name(value: Any) -> str:
    """Return the name of an item that brings none: a digest of what it holds.

    Raises:
        BadItem: It is nested too deeply.
    """
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except RecursionError as error:
        raise BadItem("nested too deeply") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_names(num_shared: int) -> str:
    """Return what there is to say of records that share a name."""
    return (
        f"records with the id of an earlier one, or with its content and no id: {num_shared:,}; each has random numbers of "
        "its own"
    )

"""Names of records. A name selects the record's random stream, so all names differ, and none depends on where a file lies."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from drafttrain.data_gen.bad_item import BadItem


class Names:
    """Gives every record a unique name, in the order of the data: repeated names get #1, #2, ..."""

    def __init__(self) -> None:
        self.num_shared = 0
        """Records whose name was used before."""
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def own(self, name: str) -> str:
        """Return this name, or if it is taken, the next free one of its form."""
        own, number = name, self._next.get(name, 0)
        while own in self._taken:
            number += 1
            own = f"{name}#{number}"
        self.num_shared += own != name
        self._next[name] = number
        self._taken.add(own)
        return own


def problem_of(name: str) -> str:
    """Return the name without its number: the id by which files of tests or marks list the problem."""
    whole, mark, number = name.rpartition("#")
    return whole if mark and number.isdecimal() else name


def content_name(value: Any) -> str:
    """Return the name of an item without an id: a digest of its content.

    Raises:
        BadItem: It is nested too deeply.
    """
    try:
        text = json.dumps(value, sort_keys=True, default=str)
    except RecursionError as error:
        raise BadItem("nested too deeply") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shared_names(num_shared: int) -> str:
    """Return the note about records that share a name."""
    return (
        f"records that repeat the id of an earlier one, or its content without an id: {num_shared:,}; each has its own "
        "random numbers"
    )

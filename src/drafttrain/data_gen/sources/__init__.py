"""Sources of text, one file a kind. A source yields items; what an item holds is in `data_gen.formats`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from drafttrain.core.registry import Registry
from drafttrain.core.settings import setting

sources = Registry("source", "drafttrain.data_gen.sources")


@dataclass
class WeightedSettings:
    """What all sources share."""

    weight: float = setting(1.0, help="Share of the trained records, relative to the other sources.", ge=0)


@dataclass(frozen=True)
class Item:
    """One raw item and where it stands, for messages and quarantine."""

    where: str
    """file:line, or the like."""
    value: Any
    """A mapping, or the raw line where it could not be read as one."""
    problem: str = ""
    """Why it could not be read; empty: it could."""


class Source(Protocol):
    """Yields items in one order on every machine."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...

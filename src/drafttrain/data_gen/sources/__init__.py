"""Sources of text, one file a kind. A source yields items; what an item holds is in `data_gen.formats`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from drafttrain.core.digests import text_digest
from drafttrain.core.registry import Registry, component_mapping
from drafttrain.core.settings import setting

if TYPE_CHECKING:
    from drafttrain.core.records import Record
    from drafttrain.data_gen.formats import Encoder

sources = Registry("source", "drafttrain.data_gen.sources")

SMOKE_ITEMS = 64


@dataclass
class WeightedSettings:
    """What all sources share."""

    weight: float = setting(1.0, help="Share of the trained records, relative to the other sources.", ge=0)
    max_items: int | None = setting(None, help="The first so many items are read; null: all.", ge=1)

    def smoke(self) -> Self:
        """Return a copy that reads a few items; whole ones: an item that the run takes is never too long for it."""
        return replace(self, max_items=min(self.max_items or SMOKE_ITEMS, SMOKE_ITEMS))


@dataclass(frozen=True)
class Item:
    """One raw item and where it stands, for messages and quarantine."""

    where: str
    """file:line, or the like."""
    value: Any
    """A mapping, or the raw line where it could not be read as one."""
    problem: str = ""
    """Why it could not be read; empty: it could."""
    private: bool = False
    """What it holds is written nowhere, not even into quarantine."""


class Source(Protocol):
    """Yields items in one order on every machine."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A source whose items may change under the same settings, as files do."""

    def version(self) -> Any:
        """Return what changes when its items do, as JSON can hold it."""
        ...


@runtime_checkable
class RecordSource(Protocol):
    """A source that makes records itself: its items say more than their text, such as the ids that were served."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...

    def records(self, item: Item, encoder: Encoder) -> list[Record]:
        """Return the records of an item."""
        ...


def stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and digest of files: a copy is the same, an edited one is not."""
    return [[path.name, path.stat().st_size, text_digest(path)] for path in paths]


def content_of(settings: Any) -> dict[str, Any]:
    """Return the settings of a source that its items depend on.

    A limit that is not set is left out: what was written before there was one stays valid.
    """
    mapping = component_mapping(settings)
    return {key: value for key, value in mapping.items() if not (key == "max_items" and value is None)}

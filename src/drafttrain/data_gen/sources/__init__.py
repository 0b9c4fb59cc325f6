"""Sources of text, one file a kind. A source yields items; `data_gen.record_keys` lists the forms of an item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

from drafttrain.core.digests import text_digest
from drafttrain.core.registry import Registry, component_mapping
from drafttrain.core.settings import setting
from drafttrain.data_gen.record_keys import IMAGES, KEYS
from drafttrain.data_gen.turns import ROLES

if TYPE_CHECKING:
    from drafttrain.core.texts import Record
    from drafttrain.data_gen.encoder import Encoder

sources = Registry("source", "drafttrain.data_gen.sources")

SMOKE_ITEMS = 64


@dataclass
class WeightedSettings:
    """Settings of all sources."""

    weight: float = setting(1.0, help="Share of the trained records, relative to the other sources.", ge=0)
    max_items: int | None = setting(None, help="Read this many items, from the first; null: all.", ge=1)
    max_lost_share: float = setting(
        0.05,
        help="Share of the items that may be quarantined; more stop the run, with counts of the reasons.",
        ge=0,
        le=1,
    )

    def smoke(self) -> Self:
        """Return a copy that reads a few items. They are not shortened: an item that fits the run must fit here."""
        return replace(self, max_items=min(self.max_items or SMOKE_ITEMS, SMOKE_ITEMS))


@dataclass(kw_only=True)
class RecordForm:
    """How the records of files are read; docs/data.md lists the keys of a record."""

    rename: dict[str, str] = setting(
        {}, help="Known key: the name that the records use for it, such as {text: content}."
    )
    roles: dict[str, str] = setting(
        {},
        help="More words for a role, such as {wizard: assistant}; user, assistant, system, tool and function_call are known.",
    )
    ignore_keys: list[str] = setting(
        [],
        help="Keys of records and of turns that the target does not read; any other unknown key quarantines the record.",
    )
    chat: bool | None = setting(
        None,
        help="Whether text under `prompt` is a user's message, read through the chat template; null: as each record says, else no.",
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, help="Arguments of the chat template, such as {enable_thinking: false}; a record's own replace them."
    )

    def check(self) -> list[str]:
        """Return problems between fields."""
        problems = [
            f"rename: {new!r} is not a key of a record. Known: {', '.join(KEYS)}"
            for new in self.rename
            if new not in KEYS
        ]
        return problems + [
            f"roles: {word!r}: {role!r} is not a role. Known: {', '.join(ROLES)}"
            for word, role in self.roles.items()
            if role not in ROLES
        ]


def images_key(form: RecordForm) -> str:
    """Return the key under which records have their images."""
    return form.rename.get(IMAGES, IMAGES)


@dataclass(kw_only=True)
class RecordSettings(RecordForm, WeightedSettings):
    """Settings of all sources of records; docs/data.md lists the keys of a record."""

    answers: Literal["all", "last"] = setting(
        "all", help="Which answers of a chat are labels: all, or only the last; the others are read."
    )


@dataclass(frozen=True)
class Item:
    """One raw item and its place, for messages and quarantine."""

    where: str
    """Such as file:line."""
    value: Any
    """A mapping, or the raw line if it could not be parsed."""
    problem: str = ""
    """Why it could not be read; empty: no problem."""
    private: bool = False
    """Its content is never written, not even into quarantine."""


class Source(Protocol):
    """Yields items in one order on every machine."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A source whose items may change under the same settings, as files do."""

    def version(self) -> Any:
        """Return a JSON value that changes when the items do."""
        ...


@runtime_checkable
class RecordSource(Protocol):
    """A source that encodes its own records: its items hold more than text, such as served ids."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...

    def records(self, item: Item, encoder: Encoder) -> list[Record]:
        """Return the records of an item."""
        ...


@runtime_checkable
class PromptSource(Protocol):
    """A source that encodes its own prompts."""

    def items(self) -> Iterator[Item]:
        """Yield all items."""
        ...

    def prompts(self, item: Item, encoder: Encoder) -> list[tuple[str, list[int]]]:
        """Return (id, tokens) of the prompts of an item."""
        ...


def without_nulls(value: Any) -> Any:
    """Return a row of a table without nulls at any depth: in a table every row has every key."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and digest of files: equal for a copy, different for an edited file."""
    return [[path.name, path.stat().st_size, text_digest(path)] for path in paths]


FIRST_NAMES = {"logprobs": "law"}
"""First names of settings that were renamed."""


def content_of(settings: Any) -> dict[str, Any]:
    """Return the settings of a source that its items depend on.

    Settings at their defaults are left out, and renamed ones keep their first name, so that stores and cursors of older
    versions stay valid.
    """
    mapping = {FIRST_NAMES.get(key, key): value for key, value in component_mapping(settings).items()}
    mapping.pop("max_lost_share", None)
    unset: dict[str, Any] = {"max_items": None, "rename": {}, "roles": {}, "ignore_keys": [], "chat": None}
    unset |= {"chat_template_kwargs": {}, "answers": "all"}
    return {key: value for key, value in mapping.items() if key not in unset or value != unset[key]}

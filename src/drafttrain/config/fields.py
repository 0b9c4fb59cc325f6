"""The fields of a settings dataclass as a recipe sees them: type, range, meaning, default."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, NamedTuple, Union

from drafttrain.core.registry import Registry

BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class Field(NamedTuple):
    """One field of a settings dataclass, as a recipe sees it."""

    name: str
    hint: Any
    """The type, without None."""
    nullable: bool
    metadata: Mapping[str, Any]
    default: Any
    """MISSING if the recipe must give a value."""

    @property
    def registry(self) -> Registry | None:
        """The registry of the components that the value can be."""
        return self.metadata.get("registry")

    @property
    def help(self) -> str:
        """The help text of the field."""
        return str(self.metadata.get("help") or "")

    def is_missing_from(self, given: Mapping[str, Any]) -> bool:
        """Return whether the value must be given because the key that could replace it is not given."""
        unless = self.metadata.get("unless")
        if callable(unless):
            return not unless(given)
        return unless is not None and (unless not in given or given[unless].value is None)

    @property
    def may_be_list(self) -> bool:
        """Whether the value is one component or a list of them."""
        return bool(self.metadata.get("or_list"))

    @property
    def is_list(self) -> bool:
        """Whether the value is a list."""
        return typing.get_origin(self.hint) is list or self.hint is list or isinstance(self.default, list)


def fields_of(settings: type) -> dict[str, Field]:
    """Return the fields of a settings dataclass by name, in their order."""
    hints = _hints_of(settings)
    fields = {}
    for field in dataclasses.fields(settings):
        if field.init:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            hint, nullable = _without_none(field.metadata.get("accepts") or hints[field.name])
            fields[field.name] = Field(field.name, hint, nullable or default is None, field.metadata, default)
    return fields


@functools.cache
def _hints_of(settings: type) -> dict[str, Any]:
    return typing.get_type_hints(settings)


def kind_of(settings: Any) -> str | None:
    """Return the kind of the component that settings configure; None for a plain section."""
    return getattr(settings, "kind", None)


def within(value: float, bounds: Mapping[str, Any]) -> bool:
    """Return whether a number is in the range of its field."""
    ge, gt, le, lt = (bounds.get(name) for name in BOUNDS)
    return (
        (ge is None or value >= ge)
        and (gt is None or value > gt)
        and (le is None or value <= le)
        and (lt is None or value < lt)
    )


def describe(hint: Any) -> str:
    """Return the description of a type for messages."""
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", types.NoneType: "null"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, Sequence):
        return f"[{describe(arguments[0])}, ...]"
    if origin in (dict, Mapping):
        return f"{{name: {describe(arguments[1])}, ...}}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    return "a section" if is_dataclass(hint) else "any value"


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether None was in it."""
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    arguments = typing.get_args(hint)
    rest = tuple(argument for argument in arguments if argument is not types.NoneType)
    return Union[rest], len(rest) < len(arguments)  # noqa: UP007

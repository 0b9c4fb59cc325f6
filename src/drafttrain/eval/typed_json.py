"""Dataclasses to JSON and back, by their annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Return a value as JSON holds it; a field whose default is None is left out while it is None."""
    if is_dataclass(value) and not isinstance(value, type):
        held = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: to_json(part) for field, part in held if part is not None or field.default is MISSING}
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return value


def from_json(kind: type[T], value: Any, *, where: str = "") -> T:
    """Return the dataclass of a JSON object. Unknown keys are ignored; null in the place of a float is nan.

    Raises:
        ValueError: With the path of a field that is missing or of another type.
    """
    hints = get_type_hints(kind)
    content = _checked(value, dict, where)
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in content or field.default is MISSING:
            path = f"{where}.{field.name}".removeprefix(".")
            if field.name not in content and not _allows_none(hints[field.name]):
                raise ValueError(f"{path} is missing")
            found[field.name] = _typed(hints[field.name], content.get(field.name), path)
    return kind(**found)


def _typed(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if _allows_none(hint):
        (hint,) = (one for one in get_args(hint) if one is not types.NoneType)
        return None if value is None else _typed(hint, value, where)
    if is_dataclass(hint):
        return from_json(hint, value, where=where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Mapping:
        content = _checked(value, dict, where)
        return {key: _typed(arguments[1], part, f"{where}.{key}") for key, part in content.items()}
    if origin in (Sequence, tuple):
        parts = [_typed(arguments[0], part, f"{where}.{i}") for i, part in enumerate(_checked(value, list, where))]
        return tuple(parts) if origin is tuple else parts
    if hint is float:
        return float("nan") if value is None else _checked(value, (float, int), where)
    return _checked(value, hint, where)


def _checked(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else "number"
        raise ValueError(f"{where or 'the file'} must be a {wanted}, got {value!r:.60}")
    return value


def _allows_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint)

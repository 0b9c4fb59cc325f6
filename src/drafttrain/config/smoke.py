"""Shrinks a recipe to about 20 steps through every stage, to test that the stages work."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from drafttrain.config.recipe import Recipe

T = TypeVar("T")


def shrink(recipe: Recipe) -> Recipe:
    """Return a copy with every section shrunk; the run gets a name of its own.

    Settings that can shrink have a method `smoke(self) -> Self`. The settings inside them are shrunk first.
    """
    small = _smaller(recipe)
    return replace(small, name=f"{recipe.name.removesuffix('-smoke')}-smoke")


def _smaller(value: T) -> T:
    if isinstance(value, list):
        return [_smaller(item) for item in value]  # type: ignore[return-value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts: dict[str, Any] = {part.name: _smaller(getattr(value, part.name)) for part in fields(value) if part.init}
    small = _same_kind(replace(value, **parts), value)
    smoke = getattr(small, "smoke", None)
    return _same_kind(smoke(), value) if callable(smoke) else small


def _same_kind(copy: T, original: Any) -> T:
    """Return `copy` with the kind of `original`."""
    if getattr(copy, "kind", None) != getattr(original, "kind", None):
        object.__setattr__(copy, "kind", original.kind)
    return copy

"""A recipe shrunk to some 20 steps through every stage: does the path work, whatever the figures."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from drafttrain.config.recipe import Recipe

T = TypeVar("T")


def shrink(recipe: Recipe) -> Recipe:
    """Return a copy in which every section is as small as it knows how to be; the run gets a name of its own.

    Settings that have something to shrink offer `smoke(self) -> Self`; what they hold is shrunk before they are.
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
    """Return `copy` under the name of the component that `original` configures."""
    if getattr(copy, "kind", None) != getattr(original, "kind", None):
        object.__setattr__(copy, "kind", original.kind)
    return copy

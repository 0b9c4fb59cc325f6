"""Models that a recipe takes from another recipe: `recipe:tiny_judge_target`."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

MADE_BY = "recipe:"


def made_by_recipes(settings: Any) -> Iterator[tuple[Any, str]]:
    """Yield (settings, key) of every key with a value `recipe:NAME`, in `settings` and all settings inside them."""
    if isinstance(settings, list):
        for item in settings:
            yield from made_by_recipes(item)
    elif is_dataclass(settings) and not isinstance(settings, type):
        for part in fields(settings):
            value = getattr(settings, part.name)
            if isinstance(value, str) and value.startswith(MADE_BY):
                yield settings, part.name
            yield from made_by_recipes(value)

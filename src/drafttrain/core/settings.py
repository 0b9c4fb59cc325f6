"""Declares a field of a settings dataclass: default, meaning, unit and range, in one call."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field, is_dataclass
from typing import Any

from drafttrain.core.registry import Registry


def setting(
    default: Any = MISSING,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    registry: Registry | None = None,
    unless: str | Callable[[Mapping[str, Any]], bool] | None = None,
    accepts: Any = None,
    or_list: bool = False,
) -> Any:
    """Return a dataclass field with metadata. Recipes are checked against it, and `recipe show` prints it.

    Args:
        default: The value if the recipe gives none. Without a default the recipe must give a value.
        help: What the field means, with its unit.
        ge, gt, le, lt: The range of a number (of every number of a list).
        registry: The value is a component: a mapping with `kind` and that kind's own settings.
            A list type means a list of such mappings.
        accepts: The type that a recipe is checked against, where it is a choice that an annotation cannot express.
        or_list: The value may also be a list of components.
        unless: The recipe must give a value even if there is a default, unless it gives this other key of the section, or this function
            accepts what the section gives.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"help": help, **bounds, "registry": registry, "unless": unless, "accepts": accepts, "or_list": or_list}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, list | dict) or is_dataclass(default) or registry is not None:
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)

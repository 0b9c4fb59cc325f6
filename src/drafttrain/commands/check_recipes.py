"""drafttrain recipe check: recipes and the parts that they name, without loading a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from drafttrain.config.load import load_recipe
from drafttrain.core.errors import RecipeError
from drafttrain.pipeline.preflight import check_parts


def checked_recipes(names: Sequence[str], overrides: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each recipe with its problems; None: it has none.

    Args:
        overrides: Values that replace those of each recipe.
    """
    for name in names:
        try:
            check_parts(load_recipe(name, overrides), fetch=False, data=False)
        except RecipeError as error:
            yield name, str(error)
        else:
            yield name, None

"""Which kind of run a recipe asks for."""

from __future__ import annotations

from drafttrain.config.recipe import Recipe
from drafttrain.config.searched import is_searched
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.head_run import HeadRun
from drafttrain.pipeline.run import Run
from drafttrain.pipeline.search_run import SearchRun


def kind_of_run(recipe: Recipe) -> type[Run]:
    """Return the class of a recipe's run: it trains a drafter or a head, or searches what a drafter is made of."""
    if recipe.head is not None:
        return HeadRun
    return SearchRun if is_searched(recipe.drafter.kind) else DrafterRun

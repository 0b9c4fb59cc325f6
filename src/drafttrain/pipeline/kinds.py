"""Which kind of run a recipe asks for."""

from __future__ import annotations

from drafttrain.config.recipe import Recipe
from drafttrain.pipeline.drafter_run import DrafterRun
from drafttrain.pipeline.head_run import HeadRun
from drafttrain.pipeline.run import Run


def kind_of_run(recipe: Recipe) -> type[Run]:
    """Return the class of a recipe's run: it trains a drafter or a head."""
    return HeadRun if recipe.head is not None else DrafterRun

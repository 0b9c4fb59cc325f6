"""Models that a recipe takes from other recipes (`recipe:NAME`): those recipes run first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from drafttrain.config.load import load_recipe
from drafttrain.config.made_by import MADE_BY, made_by_recipes
from drafttrain.config.recipe import Recipe
from drafttrain.core.console import say
from drafttrain.core.errors import RecipeError
from drafttrain.distributed.collectives import first_before_others, wait_for_all
from drafttrain.distributed.world import is_first
from drafttrain.pipeline.folder import RunFolder
from drafttrain.pipeline.kinds import kind_of_run
from drafttrain.pipeline.preflight import check_parts
from drafttrain.pipeline.run import quiet_libraries


def with_made_models(recipe: Recipe, runs: Path, *, fit: Callable[..., None], above: Sequence[str] = ()) -> Recipe:
    """Run the recipes that a recipe names, and return the recipe with the folders of their models.

    Args:
        runs: Folder of their run folders.
        fit: The command that runs a recipe in a folder.
        above: Recipes that need the model of this one.

    Raises:
        RecipeError: A recipe needs its own model.
    """
    recipe = copy.deepcopy(recipe)
    for settings, key in made_by_recipes(recipe):
        name = getattr(settings, key).removeprefix(MADE_BY)
        made = load_recipe(name)
        path = [*above, recipe.name, made.name]
        if made.name in path[:-1]:
            raise RecipeError(name, [f"{key}: a recipe cannot need its own model: {' needs '.join(path)}"])
        say(f"{recipe.name}: {key} is the model of {made.name}: {runs / made.name}")
        fit(made, runs / made.name, above=path[:-1])
        wait_for_all(f"{made.name} is exported")
        setattr(settings, key, str(runs / made.name / kind_of_run(made).what))
    return recipe


def checked_with_made_models(
    recipe: Recipe, folder: Path, *, fit: Callable[..., None], above: Sequence[str] = ()
) -> Recipe:
    """Check the parts of a recipe, run the recipes that it names, and check again with their models; return the recipe with them."""
    check_run_parts(recipe, folder)
    if not list(made_by_recipes(recipe)):
        return recipe
    made = with_made_models(recipe, folder.parent, fit=fit, above=above)
    check_run_parts(made, folder)
    return made


def check_run_parts(recipe: Recipe, folder: Path) -> None:
    """Check in the first process that the parts of a recipe fit together; a finished training does not need its data."""
    with first_before_others("it checks that target, drafter, data and export fit together"):
        if is_first():
            quiet_libraries()
            check_parts(recipe, data=not RunFolder(folder).train_done.exists())

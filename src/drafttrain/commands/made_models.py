"""Models that other recipes make: they are made first, and the recipe gets their folders."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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


def with_models_made(recipe: Recipe, runs: Path, *, above: Sequence[str] = ()) -> Recipe:
    """Return the recipe with folders where it names other recipes, whose runs in `runs` are brought up to date first.

    Raises:
        RecipeError: A recipe needs what it makes itself.
    """
    # fit imports this file and the trainer; an evaluation and an export run without either.
    from drafttrain.commands.fit import fit

    recipe = copy.deepcopy(recipe)
    for settings, key in made_by_recipes(recipe):
        name = getattr(settings, key).removeprefix(MADE_BY)
        made = load_recipe(name)
        path = [*above, recipe.name, made.name]
        if made.name in path[:-1]:
            raise RecipeError(name, [f"{key}: a recipe cannot need what it makes: {' needs '.join(path)}"])
        say(f"{recipe.name}: {key} is what {made.name} makes: {runs / made.name}")
        fit(made, runs / made.name, above=path[:-1])
        wait_for_all(f"{made.name} is exported")
        setattr(settings, key, str(runs / made.name / kind_of_run(made).what))
    return recipe


def checked_and_made(recipe: Recipe, folder: Path, *, above: Sequence[str] = ()) -> Recipe:
    """Return the recipe with the models that other recipes make, its parts checked before anything is made, and with them."""
    check_run_parts(recipe, folder)
    if not list(made_by_recipes(recipe)):
        return recipe
    made = with_models_made(recipe, folder.parent, above=above)
    check_run_parts(made, folder)
    return made


def check_run_parts(recipe: Recipe, folder: Path) -> None:
    """Look once whether the parts of a recipe fit together; a finished training does not read its data again."""
    with first_before_others("it looks whether target, drafter, data and export fit together"):
        if is_first():
            quiet_libraries()
            check_parts(recipe, data=not RunFolder(folder).train_done.exists())
